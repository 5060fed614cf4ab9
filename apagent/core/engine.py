"""The engine: events in, effects out, and the kernel state that should be.

It holds what this AP knows of its roam domain: every AP's uplink session table, every client's
serving AP, and how far it is in sync. It does no I/O, reads no clock and draws no random number:
`step` takes an event and the time. The same events in another order, repeated or split, lead to the
same state, as far as their sources allow any order at all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping
from enum import StrEnum
from functools import singledispatchmethod
from ipaddress import IPv4Address

from apagent.core.anchoring import Anchoring
from apagent.core.claims import Claims, usable
from apagent.core.clients import ClientTable
from apagent.core.desired import NetworkDelta, NetworkState, drain_changes, wanted
from apagent.core.digest import TableDigest
from apagent.core.domain import Domain
from apagent.core.effects import (
    Effect,
    EndFlows,
    Ending,
    NotePeer,
    NoteSync,
    Publish,
)
from apagent.core.events import (
    AddressConflict,
    AddressProbed,
    AdoptionFailed,
    AnchorEvent,
    ClientAged,
    ClientSeen,
    ClientsFound,
    DrainRequested,
    Event,
    FlowsAdopted,
    FlowsChanged,
    FlowsListed,
    KernelAdopted,
    PeerConnected,
    PeerDelta,
    PeerDisconnected,
    PeerPart,
    PeerSnapshot,
    ProbesAnswered,
    ReclaimRequested,
    Source,
    SyncTimedOut,
)
from apagent.core.model import (
    MAX_GENERATION,
    NAT_ADDRESS,
    PROTOCOL_OFFSET,
    STATE,
    TRANSLATION,
    UDP,
    UNKNOWN_NAT,
    ApId,
    Claim,
    FlowKey,
    Mac,
    Nat,
    NetworkName,
    SessionChanges,
    Sessions,
    SocketKey,
    advanced,
    packed_generation,
    socket_of,
    stamped,
    standing_of,
)
from apagent.core.session_tables import SessionTables

MAX_EARLY_SIGHTINGS = 65536
"""Sightings before we are in sync that are kept to be judged then."""


class PeerState(StrEnum):
    """How much of a peer's feed we hold."""

    CONNECTING = "connecting"
    SYNCING = "syncing"
    IN_SYNC = "in-sync"
    LOST = "lost"


class Engine:
    """All state of one AP's agent. Build it, feed it events, carry out its effects."""

    def __init__(self, domain: Domain) -> None:
        peers = [peer.id for peer in domain.peers]
        self.domain = domain
        self.me = domain.me.id
        self.sessions = {n.name: SessionTables(self.me, peers) for n in domain.networks}
        self.claims = Claims(domain, self.sessions)
        """All clients, and what this AP says of them."""
        self.peers = dict.fromkeys(peers, PeerState.CONNECTING)
        self.in_sync = False
        self._flows_listed = False
        self._heard: set[ApId] = set()
        self._seen_early: deque[ClientSeen] = deque(maxlen=MAX_EARLY_SIGHTINGS)
        self._effects: list[Effect] = []
        self._tables_out: dict[NetworkName, SessionChanges] = {}
        self.anchoring = Anchoring(domain, self.sessions, self.clients)
        """All APs as anchors: who is alive, who anchors new flows, who holds which address."""
        for peer in peers:
            self.anchoring.hears(peer, hears=False)

    @property
    def clients(self) -> Mapping[NetworkName, ClientTable]:
        """The clients of each network, and where they are."""
        return self.claims.clients

    @property
    def clock(self) -> int:
        """The highest generation seen, of claims and holds: a Lamport clock of the roam domain."""
        return self.claims.clock

    @property
    def is_ready(self) -> bool:
        """Whether we are in sync and have the NAT addresses that are ours, if they can be had."""
        return self.in_sync and not self.anchoring.anchors.awaits_home

    def step(self, event: Event, now: float) -> list[Effect]:
        """Take one event in; `now` is any clock in seconds.

        What depends on it are only what is displayed, and for how long a client that has left may
        still have packets in our queues (`core/roam.py`).
        """
        self.claims.now = now
        self._handle(event)
        self._release_silent()
        self._effects += self.anchoring.settle(self.clock, in_sync=self.in_sync)
        self.claims.clock = max(self.clock, self.anchoring.anchors.clock)
        self._say_forwards()
        for name, tables in self.sessions.items():
            if tables.lost:
                self._effects.append(EndFlows(name, tuple(sorted(tables.lost))))
                tables.lost.clear()
        effects, self._effects = [*self.claims.take_effects(), *self._effects], []
        claims, stated = self.claims.take_news(), self.anchoring.statement_if_changed()
        if self._tables_out or claims or stated is not None:
            effects.append(Publish(self._tables_out, claims, self.clock, stated))
            self._tables_out = {}
        return effects

    def take_deltas(self) -> dict[NetworkName, NetworkDelta]:
        """What the kernel should change since the last call, by network."""
        deltas = {
            name: drain_changes(
                self.sessions[name], self.clients[name], *self.anchoring.drain_states(name)
            )
            for name in self.sessions
        }
        return {name: delta for name, delta in deltas.items() if delta}

    def drop_deltas(self) -> None:
        """Take no account of what has changed so far: the kernel is brought to `wanted` instead."""
        for name, tables in self.sessions.items():
            tables.touched_flows.clear()
            tables.touched_sockets.clear()
            self.clients[name].touched.clear()
            self.anchoring.drain_states(name)

    def wanted(self, *, session_maps: bool = True) -> dict[NetworkName, NetworkState]:
        """What the kernel should hold, by network; flows and sockets only with `session_maps`."""
        anchoring = self.anchoring.states
        return {
            name: wanted(tables, self.clients[name], anchoring[name], session_maps=session_maps)
            for name, tables in self.sessions.items()
        }

    def snapshot(self) -> tuple[Mapping[NetworkName, Sessions], list[Claim]]:
        """What our feed says now: the sessions that we anchor, and our claims."""
        tables = {name: tables.table(self.me) for name, tables in self.sessions.items()}
        return tables, [
            claim for clients in self.clients.values() for claim in clients.own_claims()
        ]

    def digests(self, ap: ApId) -> dict[NetworkName, TableDigest]:
        """The digests of the sessions that `ap` anchors, by network."""
        return {name: tables.digest(ap) for name, tables in self.sessions.items()}

    def idle_peers(self) -> list[ApId]:
        """Peers that anchor no flow: nothing that we know of ends with them."""
        return [ap for ap in self.peers if not any(t.table(ap) for t in self.sessions.values())]

    def moved_away(self, network: NetworkName, flows: Collection[FlowKey]) -> set[FlowKey]:
        """Which flows of ours are translated to an address that another AP holds by now."""
        tables = self.sessions[network]
        own, rules = tables.table(self.me), tables.rules
        return {
            key
            for key in flows
            if (nat := own.get(key)) is not None
            and rules.holders.get(nat[NAT_ADDRESS], self.me) != self.me
            and nat[NAT_ADDRESS] not in rules.prepared
        }

    def still_to_end(self, ending: EndFlows, before: Mapping[FlowKey, Nat | None]) -> set[FlowKey]:
        """Which of `before`, flows that were to end, are still to: for the same reason.

        They come with what was known of them at that time (None: nothing).
        """
        own, ends = self.sessions[ending.network].table(self.me), self._judge_of(ending)
        return {
            key
            for key, then in before.items()
            # Else it has ended; or it has been opened anew since, and is judged by itself.
            if (nat := own.get(key)) is not None
            and (then is None or then[:STATE] == nat[:STATE])
            and ends(key, nat)
        }

    def _judge_of(self, ending: EndFlows) -> Callable[[FlowKey, Nat], bool]:
        """What tells whether a flow is to end for this reason."""
        tables, clients = self.sessions[ending.network], self.clients[ending.network]
        match ending.why:
            case Ending.LOST:
                return lambda key, _: tables.is_lost(key)
            case Ending.MOVED:
                unwanted = self.anchoring.unwanted_addresses(ending.network)
                return lambda _, nat: nat[NAT_ADDRESS] in unwanted
            case Ending.FORSAKEN:
                forsaken = self.anchoring.is_forsaken(ending.network)
                return lambda *_: forsaken
            case Ending.OWNED:
                return lambda key, _: clients.belongs_to(IPv4Address(key[:4]), ending.owner)

    @singledispatchmethod
    def _handle(self, event: Event) -> None:
        raise TypeError(f"not an event: {event!r}")

    # --- our own flows

    @_handle.register
    def _(self, event: FlowsChanged) -> None:
        self.anchoring.flows_changed(event.network, event.changes)
        changes = self.sessions[event.network].apply(
            self.me, self._stamp(event.network, event.changes)
        )
        if changes:
            self._tables_out[event.network] = changes

    @_handle.register
    def _(self, event: FlowsListed) -> None:
        for name, tables in self.sessions.items():
            listed = self._stamp(name, event.tables.get(name, {}))
            standing = self.anchoring.standing[name]
            flows = {key: nat for key, nat in listed.items() if nat is not None}
            self.anchoring.flows_listed(name, flows)
            changes = tables.replace(self.me, {**flows, **standing})
            if changes:
                self._tables_out[name] = changes
        self._flows_listed = True
        self._reach_sync()

    def _say_forwards(self) -> None:
        for name, changes in self.anchoring.take_standing().items():
            applied = self.sessions[name].apply(self.me, changes)
            self._tables_out[name] = {**self._tables_out.get(name, {}), **applied}

    # --- anchors

    @_handle.register(ProbesAnswered)
    @_handle.register(AddressProbed)
    @_handle.register(AddressConflict)
    @_handle.register(AdoptionFailed)
    @_handle.register(DrainRequested)
    @_handle.register(ReclaimRequested)
    def _(self, event: AnchorEvent) -> None:
        self.anchoring.take(event)

    @_handle.register
    def _(self, event: FlowsAdopted) -> None:
        self.anchoring.take(event)
        network = event.nat.network
        if changes := self.sessions[network].apply(self.me, self.anchoring.adopted(event)):
            self._tables_out[network] = changes

    # --- what an earlier run left

    @_handle.register
    def _(self, event: KernelAdopted) -> None:
        by_anchor: dict[ApId, dict[FlowKey, Nat]] = {}
        held: set[tuple[SocketKey, ApId]] = set()
        for key, ap in event.flows.items():
            by_anchor.setdefault(ap, {})[key] = UNKNOWN_NAT
            if key[PROTOCOL_OFFSET] == UDP:
                held.add((socket_of(key), ap))
        for socket, ap in sorted(event.sockets.items() - held):
            # What holds it isn't known, such as a port forward: any session will do.
            by_anchor.setdefault(ap, {})[standing_of(socket)] = UNKNOWN_NAT
        for ap in sorted(by_anchor.keys() & self.peers.keys()):
            self.sessions[event.network].apply(ap, by_anchor[ap])
        self.clients[event.network].adopt_routes(
            {address: ap for address, ap in event.routes.items() if ap in self.peers},
            event.elsewhere,
        )
        self.claims.claim_provisionally(event.network, _by_mac(event.neighbours))
        if self.domain.network_by_name[event.network].takeover:
            self.anchoring.adopt(event.network, event.addresses, event.forwards)

    @_handle.register
    def _(self, event: ClientsFound) -> None:
        self.claims.claim_provisionally(event.network, event.clients)

    # --- clients

    @_handle.register
    def _(self, event: ClientSeen) -> None:
        network = self.domain.network_by_name[event.network]
        if event.address is not None and not usable(network, event.address):
            return
        if self.in_sync:
            self.claims.see(event)
            return
        self._seen_early.append(event)
        self.clients[event.network].aged.pop(event.mac, None)
        if event.source is not Source.DATA:
            self.claims.found_early(event)

    @_handle.register
    def _(self, event: ClientAged) -> None:
        clients = self.clients[event.network]
        client = clients.get(event.mac)
        self._forget_sightings({(event.network, event.mac)})
        if client is not None and client.claim.ap == self.me:
            clients.aged[event.mac] = None
            if self.in_sync:
                self.claims.release_if_silent(event.network, event.mac)

    # --- peers

    @_handle.register
    def _(self, event: PeerConnected) -> None:
        self._set_peer(event.peer, PeerState.SYNCING)

    @_handle.register
    def _(self, event: PeerDisconnected) -> None:
        self._set_peer(event.peer, PeerState.LOST, event.reason)

    @_handle.register
    def _(self, event: PeerPart) -> None:
        for name, changes in event.tables.items():
            self.anchoring.heard(name, self.sessions[name].apply(event.peer, changes))

    @_handle.register
    def _(self, event: PeerSnapshot) -> None:
        for name, tables in self.sessions.items():
            if event.tables is not None:
                changes = tables.replace(event.peer, event.tables.get(name, {}))
                self.anchoring.heard(name, changes)
        self.claims.hear(event)
        for clients in self.clients.values():
            clients.drop_adopted_routes(event.peer)
        self.anchoring.hear(event.peer, event.anchor)
        self._heard.add(event.peer)
        self._set_peer(event.peer, PeerState.IN_SYNC)
        self._reach_sync()

    @_handle.register
    def _(self, event: PeerDelta) -> None:
        for name, changes in event.tables.items():
            self.anchoring.heard(name, self.sessions[name].apply(event.peer, changes))
        # The peer has seen them just now, so that what we had seen is from before.
        news = (c for c in event.claims if not (c.released or c.outdone or c.withdrawn))
        self._forget_sightings({(claim.network, claim.mac) for claim in news})
        self.claims.hear(event)
        if event.anchor is not None:
            self.anchoring.hear(event.peer, event.anchor)
        self._heard.add(event.peer)
        self._set_peer(event.peer, PeerState.IN_SYNC)
        self._reach_sync()

    @_handle.register
    def _(self, _event: SyncTimedOut) -> None:
        self._heard.update(self.peers)
        self._reach_sync()

    # --- what sessions and claims have to do with each other

    def _stamp(self, network: NetworkName, changes: SessionChanges) -> dict[FlowKey, Nat | None]:
        """Note in each newly opened session the generation of its client's claim.

        What the first listing finds is older than any claim, and what we adopt was opened
        elsewhere. What opens while we don't serve its client for certain may be some peer's: it
        yields to whoever has it too.
        """
        own = self.sessions[network].table(self.me)
        if not (own or self._flows_listed):
            return {key: nat and stamped(nat, 0) for key, nat in changes.items()}
        handed = self.anchoring.being_adopted(network)
        opened: dict[bytes, bytes] = {}
        """Client -> the generation of what it opens now."""
        result: dict[FlowKey, Nat | None] = {}
        for key, nat in changes.items():
            if nat is None:
                result[key] = None
                continue
            known = own.get(key)
            if handed and (known is None or known[TRANSLATION] != nat[TRANSLATION]):
                known = handed.get(nat[NAT_ADDRESS], {}).get(key)
            if known and known[TRANSLATION] == nat[TRANSLATION]:
                result[key] = advanced(known, nat)
                continue
            address = key[:4]
            when = opened.get(address)
            if when is None:
                when = opened[address] = packed_generation(self._generation_of(network, address))
            result[key] = Nat(nat[TRANSLATION] + when + nat[STATE:])
        return result

    def _generation_of(self, network: NetworkName, client: bytes) -> int:
        """Under which claim the client (4 bytes) opens flows here."""
        if not self._flows_listed:
            return 0
        owner = self.clients[network].owner(IPv4Address(client))
        return (owner.claim.generation if owner else 0) or MAX_GENERATION

    def _release_silent(self) -> None:
        for name, tables in self.sessions.items():
            if tables.silenced and self.in_sync:
                self.claims.release_silent(name)

    # --- sync

    def _reach_sync(self) -> None:
        if self.in_sync or not self._flows_listed or self._heard < self.peers.keys():
            return
        self.in_sync = True
        self.anchoring.reach_sync()
        self.claims.confirm()
        for sighting in self._seen_early:
            self.claims.see(sighting)
        self._seen_early.clear()
        for name, clients in self.clients.items():
            for mac in tuple(clients.aged):
                self.claims.release_if_silent(name, mac)
        missing = tuple(p for p, state in self.peers.items() if state is not PeerState.IN_SYNC)
        self._effects.append(NoteSync(missing))

    def _forget_sightings(self, clients: Collection[tuple[NetworkName, Mac]]) -> None:
        """What was seen of these clients before we are in sync proves nothing any more."""
        if self._seen_early and clients:
            early = [seen for seen in self._seen_early if (seen.network, seen.mac) not in clients]
            self._seen_early = deque(early, MAX_EARLY_SIGHTINGS)

    def _set_peer(self, peer: ApId, state: PeerState, reason: str = "") -> None:
        self.anchoring.hears(peer, hears=state is PeerState.IN_SYNC)
        if self.peers[peer] is not state:
            self.peers[peer] = state
            self._effects.append(NotePeer(peer, state, reason))


def _by_mac(neighbours: Mapping[IPv4Address, Mac]) -> dict[Mac, frozenset[IPv4Address]]:
    clients: dict[Mac, frozenset[IPv4Address]] = {}
    for address, mac in neighbours.items():
        clients[mac] = clients.get(mac, frozenset()) | {address}
    return clients
