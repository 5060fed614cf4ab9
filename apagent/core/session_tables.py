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

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TypeVar

from apagent.core.digest import TableDigest
from apagent.core.holders import Holders
from apagent.core.model import (
    ANY_REMOTE,
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

_PAIR = 2
_CLIENT: Callable[[FlowKey], bytes] = itemgetter(slice(0, 4))
"""`client_of` that takes no call of Python."""


def _is_udp(key: FlowKey) -> bool:
    return key[PROTOCOL_OFFSET] == UDP


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
    """All uplink session tables of one network, as `me` knows them.

    Changes come by the ten thousand a second, and nearly all of them are of flows that one AP alone
    has. For these, nothing here depends on how many APs or sessions there are.
    """

    def __init__(self, me: ApId, peers: Iterable[ApId]) -> None:
        self._me = me
        self._tables: dict[ApId, dict[FlowKey, Nat]] = {ap: {} for ap in sorted({me, *peers})}
        self._digests = {ap: TableDigest() for ap in self._tables}
        self._sockets: dict[ApId, dict[SocketKey, int]] = {ap: {} for ap in self._tables}
        self._by_client: dict[ApId, Counter[bytes]] = {ap: Counter() for ap in self._tables}
        self._holders = Holders(me, self._tables[me])
        self._socket_holders = Holders(me, self._sockets[me])
        self._standing: dict[bytes, dict[ApId, int]] = {}
        self._mapped: dict[bytes, int] = {}
        """Clients with sessions of peers -> how many peers, and standing sessions."""
        self.touched_flows: dict[FlowKey, ApId | None] = {}
        """Flows whose anchor may have changed -> the anchor before (None: ours or nobody's)."""
        self.touched_sockets: dict[SocketKey, ApId | None] = {}
        self.touched_clients: dict[bytes, bool] = {}
        """Client addresses of which `is_mapped` may have changed -> what it was before."""
        self.silenced: set[bytes] = set()
        """Clients' addresses (4 bytes) that may have no session anywhere any more; whoever looks
        into that clears it."""
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
        """Apply a batch to the table of `ap`; returns what really changed.

        Flows that `ap` alone has are opened and closed all at once; the others one by one.
        """
        table = self._tables[ap]
        effective = {key: nat for key, nat in changes.items() if table.get(key) != nat}
        self._digests[ap].follow(table, effective)
        opened, closed, rest = self._sorted(ap, effective)
        self._open_alone(ap, opened)
        self._close_alone(ap, closed)
        for key, nat in rest.items():
            if nat is None:
                self._close(ap, key)
            elif key not in table:
                self._open(ap, key, nat)
            else:
                if key in self._holders.shared:
                    self._touch_flow(ap, key)
                table[key] = nat
        self._find_lost(ap, effective)
        return effective

    def _sorted(
        self, ap: ApId, changes: SessionChanges
    ) -> tuple[dict[FlowKey, Nat], list[FlowKey], dict[FlowKey, Nat | None]]:
        """The flows that nobody has yet, those of `ap` alone that end, and the rest."""
        table, own = self._tables[ap], self._tables[self._me]
        peer, shared = self._holders.peer, self._holders.shared
        opened: dict[FlowKey, Nat] = {}
        closed: list[FlowKey] = []
        rest: dict[FlowKey, Nat | None] = {}
        for key, nat in changes.items():
            if key[4:8] == ANY_REMOTE:
                rest[key] = nat
            elif nat is None:
                if key in shared:
                    rest[key] = None
                else:
                    closed.append(key)
            elif key in table or key in peer or key in own:
                rest[key] = nat
            else:
                opened[key] = nat
        return opened, closed, rest

    def _open_alone(self, ap: ApId, opened: Sessions) -> None:
        """`_open` for many flows that nobody has, and none of which is standing."""
        self._note(self.touched_flows, ap, opened, None)
        self._tables[ap].update(opened)
        self._holders.add_alone(ap, opened)
        clients = self._by_client[ap]
        opened_by = Counter(map(_CLIENT, opened))
        for client in opened_by:
            if client not in clients:
                self._map_client(ap, client)
        clients.update(opened_by)
        self._hold_sockets(ap, map(socket_of, filter(_is_udp, opened)))

    def _close_alone(self, ap: ApId, closed: Collection[FlowKey]) -> None:
        """`_close` for many flows that `ap` alone has, and none of which is standing."""
        self._note(self.touched_flows, ap, closed, ap)
        table, clients = self._tables[ap], self._by_client[ap]
        for key in closed:
            del table[key]
            client = key[:4]
            _decrement(clients, client)
            if client not in clients:
                self.silenced.add(client)
                self._unmap_client(ap, client)
        self._holders.remove_alone(ap, closed)
        for key in filter(_is_udp, closed):
            self._release_socket(ap, socket_of(key))

    def _note(
        self, touched: dict[_K, ApId | None], ap: ApId, keys: Iterable[_K], before: ApId | None
    ) -> None:
        """Note in `touched` who had keys that nobody has but `ap`.

        What we alone have is in no map, before or after, unless our own flows are exposed.
        """
        if ap != self._me or self.rules.exposed:
            for key in keys:
                touched.setdefault(key, before)

    def replace(self, ap: ApId, sessions: Sessions) -> dict[FlowKey, Nat | None]:
        """Make the table of `ap` equal to `sessions`; returns the difference that was applied."""
        table = self._tables[ap]
        difference: dict[FlowKey, Nat | None] = {key: None for key in table if key not in sessions}
        difference.update((key, nat) for key, nat in sessions.items() if table.get(key) != nat)
        return self.apply(ap, difference)

    def anchor(self, key: FlowKey) -> ApId | None:
        """The peer that the kernel should send this flow's packets to; None: none."""
        group = self._holders.shared.get(key)
        if group is None:
            return self._alone(self._holders.peer.get(key), key in self._tables[self._me])
        return self._unless_ours(self._first(key, group))

    def _first(self, key: FlowKey, group: tuple[ApId, ...]) -> ApId:
        """Who of the group, which all anchor the flow, has the best right to it."""
        tables = self._tables
        if len(group) == _PAIR:
            # Nearly always one continues what the other has begun.
            one, two = group
            address = tables[one][key][NAT_ADDRESS]
            holder = self.rules.holders.get(address)
            if holder in group and tables[two][key][NAT_ADDRESS] == address:
                return holder
        return min(((ap, tables[ap][key]) for ap in group), key=self._rank)[0]

    def _alone(self, peer: ApId | None, ours: bool) -> ApId | None:  # noqa: FBT001 - private
        return self._me if ours and self.rules.exposed else peer

    def _unless_ours(self, ap: ApId | None) -> ApId | None:
        return None if ap == self._me and not self.rules.exposed else ap

    def _rank(self, held: tuple[ApId, Nat]) -> tuple[bool, bool, bytes]:
        """What orders the anchors of one flow: the lowest has it, and the lowest id of equals."""
        ap, nat = held
        rules = self.rules
        holder = rules.holders.get(nat[NAT_ADDRESS], ap)
        return holder != ap, ap in rules.dead, nat[GENERATION]

    def socket_anchor(self, socket: SocketKey) -> ApId | None:
        """The peer that the kernel should send this socket's new flows to; None: none."""
        group = self._socket_holders.shared.get(socket)
        if group is None:
            ours = socket in self._sockets[self._me]
            return self._alone(self._socket_holders.peer.get(socket), ours)
        if self._me in group:
            return self._unless_ours(self._me)
        return min(group, key=self.rules.dead.__contains__)

    def flow_changes(self) -> Iterator[tuple[FlowKey, ApId | None, ApId | None]]:
        """The flows whose anchor has changed: who it was, and who it is now."""
        return _changes(self.touched_flows, self._holders, self.anchor, exposed=self.rules.exposed)

    def socket_changes(self) -> Iterator[tuple[SocketKey, ApId | None, ApId | None]]:
        """The sockets whose anchor has changed: who it was, and who it is now."""
        holders, exposed = self._socket_holders, self.rules.exposed
        return _changes(self.touched_sockets, holders, self.socket_anchor, exposed=exposed)

    def judge_by(self, rules: AnchorRules) -> None:
        """Judge by other rules from now on."""
        old = self.rules
        if rules == old:
            return
        shared = set(self._holders.shared)
        sockets = set(self._socket_holders.shared)
        if rules.exposed != old.exposed:
            shared.update(self._tables[self._me])
            sockets.update(self._sockets[self._me])
        for key in shared:
            if key not in self.touched_flows and not is_standing(key):
                self.touched_flows[key] = self.anchor(key)
        for socket in sockets:
            if socket not in self.touched_sockets:
                self.touched_sockets[socket] = self.socket_anchor(socket)
        self.rules = rules
        self.lost -= shared
        self._find_lost(None, shared)

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
        return {ap: counts[client] for ap, counts in self._by_client.items() if client in counts}

    def is_mapped(self, client: bytes) -> bool:
        """Whether the client address (4 bytes) has sessions of any peer.

        Else nothing in the kernel's maps leads its packets to another AP.
        """
        return client in self._mapped

    def is_awaited(self, client: bytes) -> bool:
        """Whether a port is forwarded to the client address (4 bytes)."""
        return client in self._standing

    def _open(self, ap: ApId, key: FlowKey, nat: Nat) -> None:
        self._touch_flow(ap, key)
        self._tables[ap][key] = nat
        self._holders.add(ap, key)
        client, standing = client_of(key), is_standing(key)
        if standing:
            counts = self._standing.setdefault(client, {})
            counts[ap] = counts.get(ap, 0) + 1
            self._map_client(ap, client)
        else:
            numbers = self._by_client[ap]
            if client not in numbers:
                self._map_client(ap, client)
            numbers[client] += 1
        if standing or key[PROTOCOL_OFFSET] == UDP:
            self._hold_socket(ap, socket_of(key))

    def _close(self, ap: ApId, key: FlowKey) -> None:
        self._touch_flow(ap, key)
        del self._tables[ap][key]
        self._holders.remove(ap, key)
        client, standing = client_of(key), is_standing(key)
        if standing:
            _decrement(self._standing[client], ap)
            if not self._standing[client]:
                del self._standing[client]
                self.silenced.add(client)
            self._unmap_client(ap, client)
        else:
            numbers = self._by_client[ap]
            _decrement(numbers, client)
            if client not in numbers:
                self.silenced.add(client)
                self._unmap_client(ap, client)
        if standing or key[PROTOCOL_OFFSET] == UDP:
            self._release_socket(ap, socket_of(key))

    def _map_client(self, ap: ApId, client: bytes) -> None:
        """`ap` has a first session of the client, or another standing one."""
        if ap != self._me:
            self.touched_clients.setdefault(client, client in self._mapped)
            self._mapped[client] = self._mapped.get(client, 0) + 1

    def _unmap_client(self, ap: ApId, client: bytes) -> None:
        if ap != self._me:
            self.touched_clients.setdefault(client, True)
            _decrement(self._mapped, client)

    def _hold_socket(self, ap: ApId, socket: SocketKey) -> None:
        sockets = self._sockets[ap]
        count = sockets.get(socket, 0)
        if not count:
            self._touch_socket(ap, socket)
            self._socket_holders.add(ap, socket)
        sockets[socket] = count + 1

    def _hold_sockets(self, ap: ApId, sockets: Iterable[SocketKey]) -> None:
        """`_hold_socket` for many: those that nobody has are noted all at once."""
        held, own, peer = self._sockets[ap], self._sockets[self._me], self._socket_holders.peer
        alone: list[SocketKey] = []
        for socket in sockets:
            if socket in held:
                held[socket] += 1
            elif socket in peer or socket in own:
                self._hold_socket(ap, socket)
            else:
                alone.append(socket)
                held[socket] = 1
        self._note(self.touched_sockets, ap, alone, None)
        self._socket_holders.add_alone(ap, alone)

    def _release_socket(self, ap: ApId, socket: SocketKey) -> None:
        sockets = self._sockets[ap]
        if sockets[socket] > 1:
            sockets[socket] -= 1
            return
        self._touch_socket(ap, socket)
        del sockets[socket]
        self._socket_holders.remove(ap, socket)

    def _find_lost(self, ap: ApId | None, changed: Iterable[FlowKey]) -> None:
        """Note which of our flows `changed` are lost now, by what `ap` said of them."""
        shared = self._holders.shared
        if not shared and not self.lost:
            return
        ours = self._tables[self._me]
        for key in changed:
            if key not in ours or is_standing(key):
                self.lost.discard(key)
            elif ap == self._me and key not in shared:
                continue
            elif self.is_lost(key):
                self.lost.add(key)

    def is_lost(self, key: FlowKey) -> bool:
        """Whether another anchor has the better right to this flow of ours."""
        if self.anchor(key) in (None, self._me):
            return False
        return self._tables[self._me][key][NAT_ADDRESS] not in self.rules.prepared

    def _touch_flow(self, ap: ApId, key: FlowKey) -> None:
        """Note who has the flow before `ap` changes what it says of it.

        A flow that we alone have is in no map, before or after.
        """
        if key in self.touched_flows or is_standing(key):
            return
        if ap != self._me or self.rules.exposed or key in self._holders.peer:
            self.touched_flows[key] = self.anchor(key)

    def _touch_socket(self, ap: ApId, socket: SocketKey) -> None:
        if socket in self.touched_sockets:
            return
        if ap != self._me or self.rules.exposed or socket in self._socket_holders.peer:
            self.touched_sockets[socket] = self.socket_anchor(socket)


def _changes(
    touched: Mapping[_K, ApId | None],
    holders: Holders[_K],
    anchor: Callable[[_K], ApId | None],
    *,
    exposed: bool,
) -> Iterator[tuple[_K, ApId | None, ApId | None]]:
    """Those of the touched whose anchor is another one: nearly all have one peer's or none."""
    peer, shared = holders.peer, holders.shared
    for key, before in touched.items():
        now = anchor(key) if exposed or key in shared else peer.get(key)
        if now != before:
            yield key, before, now


def _decrement(counts: dict[_K, int], key: _K) -> None:
    if counts[key] == 1:
        del counts[key]
    else:
        counts[key] -= 1
