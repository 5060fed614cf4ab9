"""The uplink session tables of one network: our own and every peer's.

A table is written by its anchor alone. What this class adds is what the kernel should hold because
of all tables together, and which of it a change may have touched.

Two rules, the same on every AP, decide where tables overlap:

- The same flow at two anchors (a race at a roam, a socket reused, an anchor that continues another
  one's flows): whoever holds the NAT address before who doesn't, the living before the dead, then
  the anchor that opened it under the older claim of its client; if both did so under the same one,
  the lowest id. An AP whose own flow loses ends it (`lost`).
- A client's UDP socket (endpoint-independent mapping, RFC 4787, section 4.1) follows us if we
  translate any flow of it, since those flows are not in the kernel's maps; else the lowest id of a
  living anchor. So does a socket that ports are forwarded to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from apagent.core.digest import TableDigest
from apagent.core.model import (
    GENERATION,
    NAT_ADDRESS,
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


@dataclass(frozen=True, slots=True)
class AnchorRules:
    """What is known of the anchors of a network, as far as it decides whose flow a flow is."""

    dead: frozenset[ApId] = frozenset()
    """Anchors whose flows are dead unless somebody continues them."""
    holders: Mapping[bytes, ApId] = field(default_factory=dict)
    """NAT addresses (4 bytes) that move between APs -> who holds them."""
    prepared: frozenset[bytes] = frozenset()
    """NAT addresses (4 bytes) whose flows we are ready to continue while another AP still holds
    them: our copies of these flows don't lose."""
    exposed: bool = False
    """Our own flows are in the kernel's maps, too, since what is not there goes to another AP."""


class SessionTables:
    """All uplink session tables of one network, as `me` knows them."""

    def __init__(self, me: ApId, peers: Iterable[ApId]) -> None:
        self._me = me
        self._tables: dict[ApId, dict[FlowKey, Nat]] = {ap: {} for ap in sorted({me, *peers})}
        self._digests = {ap: TableDigest() for ap in self._tables}
        self._sockets: dict[ApId, dict[SocketKey, int]] = {ap: {} for ap in self._tables}
        self._by_client: dict[bytes, dict[ApId, int]] = {}
        self._standing: dict[bytes, dict[ApId, int]] = {}
        self.touched_flows: dict[FlowKey, ApId | None] = {}
        """Flows whose anchor may have changed -> the anchor before (None: ours or nobody's)."""
        self.touched_sockets: dict[SocketKey, ApId | None] = {}
        self.rules = AnchorRules()
        self.lost: set[FlowKey] = set()
        """Flows that we anchor and that another anchor has the better right to."""

    def table(self, ap: ApId) -> Sessions:
        """The sessions that `ap` anchors."""
        return self._tables[ap]

    def digest(self, ap: ApId) -> TableDigest:
        """The digest of the sessions that `ap` anchors, which follows every change."""
        return self._digests[ap]

    def all(self) -> Iterator[tuple[ApId, Sessions]]:
        """Every anchor with its table, in the order of ids."""
        return iter(self._tables.items())

    def apply(self, ap: ApId, changes: SessionChanges) -> dict[FlowKey, Nat | None]:
        """Apply a batch to the table of `ap`; returns what really changed."""
        table, note = self._tables[ap], self._digests[ap].change
        effective: dict[FlowKey, Nat | None] = {}
        for key, nat in changes.items():
            old = table.get(key)
            if old == nat:
                continue
            effective[key] = nat
            note(key, old, nat)
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
        table = self._tables[ap]
        difference: dict[FlowKey, Nat | None] = {key: None for key in table if key not in sessions}
        difference.update((key, nat) for key, nat in sessions.items() if table.get(key) != nat)
        return self.apply(ap, difference)

    def anchor(self, key: FlowKey) -> ApId | None:
        """The peer that the kernel should send this flow's packets to; None: none."""
        best: ApId | None = None
        rank: tuple[bool, bool, bytes] | None = None
        for ap, table in self._tables.items():
            nat = table.get(key)
            if nat is None:
                continue
            if best is None:
                best, first = ap, nat
                continue
            rank = rank or self._rank(best, first)
            other = self._rank(ap, nat)
            if other < rank:
                best, rank = ap, other
        return None if best == self._me and not self.rules.exposed else best

    def _rank(self, ap: ApId, nat: Nat) -> tuple[bool, bool, bytes]:
        """What orders the anchors of one flow: the lowest has it, and the lowest id of equals."""
        rules = self.rules
        holder = rules.holders.get(nat[NAT_ADDRESS], ap)
        return holder != ap, ap in rules.dead, nat[GENERATION]

    def socket_anchor(self, socket: SocketKey) -> ApId | None:
        """The peer that the kernel should send this socket's new flows to; None: none."""
        if socket in self._sockets[self._me]:
            return self._me if self.rules.exposed else None
        dead: ApId | None = None
        for ap, sockets in self._sockets.items():
            if socket in sockets:
                if ap not in self.rules.dead:
                    return ap
                dead = dead or ap
        return dead

    def judge_by(self, rules: AnchorRules) -> None:
        """Judge by other rules from now on."""
        old = self.rules
        if rules == old:
            return
        judged_anew = rules.dead ^ old.dead
        for address in rules.holders.keys() | old.holders.keys():
            if (before := old.holders.get(address)) != (after := rules.holders.get(address)):
                judged_anew |= {ap for ap in (before, after) if ap is not None}
        if rules.prepared != old.prepared:
            judged_anew |= {self._me}
        shared = {key for ap in judged_anew for key in self._shared(self._tables, ap)}
        sockets = {socket for ap in judged_anew for socket in self._shared(self._sockets, ap)}
        if rules.exposed != old.exposed:
            shared.update(self._tables[self._me])
            sockets.update(self._sockets[self._me])
        for key in shared:
            self._touch_flow(key)
        for socket in sockets:
            self._touch_socket(socket)
        self.rules = rules
        self.lost -= shared
        self._find_lost(None, shared)

    def _shared(self, tables: Mapping[ApId, Mapping[_K, object]], ap: ApId) -> set[_K]:
        """The keys that `ap` has in common with another one."""
        own = tables.get(ap, {}).keys()
        return {key for other in tables if other != ap for key in own & tables[other].keys()}

    def desired_flows(self) -> dict[FlowKey, ApId]:
        """Every flow that the kernel should tunnel, with its anchor."""
        desired: dict[FlowKey, ApId] = {}
        for ap, table in self._tables.items():
            if ap == self._me and not self.rules.exposed:
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
        dead = self.rules.dead
        # Who is written last has it: the living after the dead, the lowest id after the others.
        best_first = sorted(self._sockets, key=lambda ap: ap in dead)
        for ap in best_first[::-1]:
            if ap != self._me:
                desired.update(dict.fromkeys(self._sockets[ap], ap))
        for socket in self._sockets[self._me]:
            desired.pop(socket, None)
        if self.rules.exposed:
            desired.update(dict.fromkeys(self._sockets[self._me], self._me))
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

    def _find_lost(self, ap: ApId | None, changed: Iterable[FlowKey]) -> None:
        """Note which of our flows `changed` are lost now, by what `ap` said of them."""
        ours = self._tables[self._me]
        others = [table for other, table in self._tables.items() if other != self._me]
        for key in changed:
            if key not in ours or is_standing(key):
                self.lost.discard(key)
            elif ap == self._me and not any(key in table for table in others):
                continue
            elif (
                self.anchor(key) not in (None, self._me)
                and ours[key][NAT_ADDRESS] not in self.rules.prepared
            ):
                self.lost.add(key)

    def _touch(self, key: FlowKey) -> None:
        self._touch_flow(key)
        if _holds_socket(key):
            self._touch_socket(socket_of(key))

    def _touch_flow(self, key: FlowKey) -> None:
        if key not in self.touched_flows and not is_standing(key):
            self.touched_flows[key] = self.anchor(key)

    def _touch_socket(self, socket: SocketKey) -> None:
        if socket not in self.touched_sockets:
            self.touched_sockets[socket] = self.socket_anchor(socket)


def _holds_socket(key: FlowKey) -> bool:
    return key[PROTOCOL_OFFSET] == UDP or is_standing(key)


def _decrement(counts: dict[_K, int], key: _K) -> None:
    if counts[key] == 1:
        del counts[key]
    else:
        counts[key] -= 1
