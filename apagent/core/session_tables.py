"""The uplink session tables of one network: our own and every peer's.

A table is written by its anchor alone. What this class adds is what the kernel should hold because
of all tables together, and which of it a change may have touched.

Two rules, the same on every AP, decide where tables overlap:

- The same flow at two anchors (a race at a roam, a socket reused): the anchor that opened it under
  the older claim of its client has it; if both did so under the same one, the lowest id. An AP
  whose own flow loses ends it (`lost`).
- A client's UDP socket (endpoint-independent mapping, RFC 4787, section 4.1) follows us if we
  translate any flow of it, since those flows are not in the kernel's maps; else the lowest id. So
  does a socket that ports are forwarded to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from apagent.core.model import (
    GENERATION,
    PROTOCOL_OFFSET,
    UDP,
    ApId,
    FlowKey,
    Nat,
    SessionChanges,
    Sessions,
    SocketKey,
    client_of,
    is_standing,
    socket_of,
)

_K = TypeVar("_K")

UNKNOWN_NAT = Nat(bytes(11))
"""Translation of an adopted session until its anchor tells it; it is as old as can be."""


class SessionTables:
    """All uplink session tables of one network, as `me` knows them."""

    def __init__(self, me: ApId, peers: Iterable[ApId]) -> None:
        self._me = me
        self._tables: dict[ApId, dict[FlowKey, Nat]] = {ap: {} for ap in sorted({me, *peers})}
        self._sockets: dict[ApId, dict[SocketKey, int]] = {ap: {} for ap in self._tables}
        self._by_client: dict[bytes, dict[ApId, int]] = {}
        self._standing: dict[bytes, dict[ApId, int]] = {}
        self.touched_flows: dict[FlowKey, ApId | None] = {}
        """Flows whose anchor may have changed -> the anchor before (None: ours or nobody's)."""
        self.touched_sockets: dict[SocketKey, ApId | None] = {}
        self.lost: set[FlowKey] = set()
        """Flows that we anchor and that another anchor has the better right to."""

    def table(self, ap: ApId) -> Sessions:
        """The sessions that `ap` anchors."""
        return self._tables[ap]

    def all(self) -> Iterator[tuple[ApId, Sessions]]:
        """Every anchor with its table, in the order of ids."""
        return iter(self._tables.items())

    def apply(self, ap: ApId, changes: SessionChanges) -> dict[FlowKey, Nat | None]:
        """Apply a batch to the table of `ap`; returns what really changed."""
        table = self._tables[ap]
        effective: dict[FlowKey, Nat | None] = {}
        for key, nat in changes.items():
            old = table.get(key)
            if old == nat:
                continue
            effective[key] = nat
            if nat is None:
                self._close(ap, key)
            elif old is None:
                self._open(ap, key, nat)
            else:
                self._touch(key)
                table[key] = nat
        self._find_lost(ap, effective)
        return effective

    def replace(self, ap: ApId, sessions: Sessions) -> dict[FlowKey, Nat | None]:
        """Make the table of `ap` equal to `sessions`; returns the difference that was applied."""
        difference: dict[FlowKey, Nat | None] = {
            key: None for key in self._tables[ap] if key not in sessions
        }
        difference.update(sessions)
        return self.apply(ap, difference)

    def anchor(self, key: FlowKey) -> ApId | None:
        """The peer that the kernel should send this flow's packets to; None: none."""
        best: ApId | None = None
        oldest = b""
        for ap, table in self._tables.items():
            nat = table.get(key)
            if nat is not None and (best is None or nat[GENERATION] < oldest):
                best, oldest = ap, nat[GENERATION]
        return None if best == self._me else best

    def socket_anchor(self, socket: SocketKey) -> ApId | None:
        """The peer that the kernel should send this socket's new flows to; None: none."""
        if socket in self._sockets[self._me]:
            return None
        for ap, sockets in self._sockets.items():
            if socket in sockets:
                return ap
        return None

    def desired_flows(self) -> dict[FlowKey, ApId]:
        """Every flow that the kernel should tunnel, with its anchor."""
        desired: dict[FlowKey, ApId] = {}
        for ap, table in self._tables.items():
            if ap == self._me:
                continue
            for key in table:
                if is_standing(key):
                    continue
                anchor = ap if key not in desired else self.anchor(key)
                if anchor is not None:
                    desired[key] = anchor
        for key in self._tables[self._me].keys() & desired.keys():
            if self.anchor(key) is None:
                del desired[key]
        return desired

    def desired_sockets(self) -> dict[SocketKey, ApId]:
        """Every UDP socket that the kernel should tunnel, with its anchor."""
        desired: dict[SocketKey, ApId] = {}
        for ap, sockets in reversed(self._sockets.items()):
            if ap != self._me:
                desired.update(dict.fromkeys(sockets, ap))
        for socket in self._sockets[self._me]:
            desired.pop(socket, None)
        return desired

    def flows_of(self, client: bytes) -> Mapping[ApId, int]:
        """Number of live sessions of the client address (4 bytes) by anchor."""
        return self._by_client.get(client, {})

    def is_awaited(self, client: bytes) -> bool:
        """Whether a port is forwarded to the client address (4 bytes)."""
        return client in self._standing

    def _open(self, ap: ApId, key: FlowKey, nat: Nat) -> None:
        self._touch(key)
        self._tables[ap][key] = nat
        by_client = self._standing if is_standing(key) else self._by_client
        counts = by_client.setdefault(client_of(key), {})
        counts[ap] = counts.get(ap, 0) + 1
        if _holds_socket(key):
            sockets = self._sockets[ap]
            socket = socket_of(key)
            sockets[socket] = sockets.get(socket, 0) + 1

    def _close(self, ap: ApId, key: FlowKey) -> None:
        self._touch(key)
        del self._tables[ap][key]
        by_client = self._standing if is_standing(key) else self._by_client
        client = client_of(key)
        _decrement(by_client[client], ap)
        if not by_client[client]:
            del by_client[client]
        if _holds_socket(key):
            _decrement(self._sockets[ap], socket_of(key))

    def _find_lost(self, ap: ApId, changed: Iterable[FlowKey]) -> None:
        ours = self._tables[self._me]
        others = [table for other, table in self._tables.items() if other != self._me]
        for key in changed:
            if key not in ours or is_standing(key):
                self.lost.discard(key)
            elif (ap != self._me or any(key in table for table in others)) and self.anchor(key):
                self.lost.add(key)

    def _touch(self, key: FlowKey) -> None:
        if key not in self.touched_flows and not is_standing(key):
            self.touched_flows[key] = self.anchor(key)
        if _holds_socket(key):
            socket = socket_of(key)
            if socket not in self.touched_sockets:
                self.touched_sockets[socket] = self.socket_anchor(socket)


def _holds_socket(key: FlowKey) -> bool:
    return key[PROTOCOL_OFFSET] == UDP or is_standing(key)


def _decrement(counts: dict[_K, int], key: _K) -> None:
    if counts[key] == 1:
        del counts[key]
    else:
        counts[key] -= 1
