"""The uplink session tables of one network: our own and every peer's.

A table is written by its anchor alone. What this class adds is what the kernel should hold because
of all tables together, and which of it a change may have touched.

Two rules, the same on every AP, decide where tables overlap:

- The same flow at two anchors (a race at a roam): the anchor with the lowest id has it.
- A client's UDP socket (RFC 4787, section 4.1, endpoint-independent mapping) follows us if we
  translate any flow of it, since those flows are not in the kernel's maps; else the lowest id.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from apagent.core.model import (
    PROTOCOL_OFFSET,
    UDP,
    ApId,
    FlowKey,
    Nat,
    SessionChanges,
    Sessions,
    SocketKey,
    client_of,
    socket_of,
)

_K = TypeVar("_K")

UNKNOWN_NAT = Nat(bytes(6))
"""Translation of an adopted session until its anchor tells it."""


class SessionTables:
    """All uplink session tables of one network, as `me` knows them."""

    def __init__(self, me: ApId, peers: Iterable[ApId]) -> None:
        self._me = me
        self._tables: dict[ApId, dict[FlowKey, Nat]] = {ap: {} for ap in sorted({me, *peers})}
        self._sockets: dict[ApId, dict[SocketKey, int]] = {ap: {} for ap in self._tables}
        self._by_client: dict[bytes, dict[ApId, int]] = {}
        self.touched_flows: dict[FlowKey, ApId | None] = {}
        """Flows whose anchor may have changed -> the anchor before (None: ours or nobody's)."""
        self.touched_sockets: dict[SocketKey, ApId | None] = {}

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
                table[key] = nat
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
        for ap, table in self._tables.items():
            if key in table:
                return None if ap == self._me else ap
        return None

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
        for ap, table in reversed(self._tables.items()):
            if ap == self._me:
                for key in table:
                    desired.pop(key, None)
            else:
                desired.update(dict.fromkeys(table, ap))
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

    def _open(self, ap: ApId, key: FlowKey, nat: Nat) -> None:
        self._touch(key)
        self._tables[ap][key] = nat
        counts = self._by_client.setdefault(client_of(key), {})
        counts[ap] = counts.get(ap, 0) + 1
        if key[PROTOCOL_OFFSET] == UDP:
            sockets = self._sockets[ap]
            socket = socket_of(key)
            sockets[socket] = sockets.get(socket, 0) + 1

    def _close(self, ap: ApId, key: FlowKey) -> None:
        self._touch(key)
        del self._tables[ap][key]
        client = client_of(key)
        counts = self._by_client[client]
        _decrement(counts, ap)
        if not counts:
            del self._by_client[client]
        if key[PROTOCOL_OFFSET] == UDP:
            _decrement(self._sockets[ap], socket_of(key))

    def _touch(self, key: FlowKey) -> None:
        if key not in self.touched_flows:
            self.touched_flows[key] = self.anchor(key)
        if key[PROTOCOL_OFFSET] == UDP:
            socket = socket_of(key)
            if socket not in self.touched_sockets:
                self.touched_sockets[socket] = self.socket_anchor(socket)


def _decrement(counts: dict[_K, int], key: _K) -> None:
    if counts[key] == 1:
        del counts[key]
    else:
        counts[key] -= 1
