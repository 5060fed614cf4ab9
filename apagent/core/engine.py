"""The engine: events in, effects out, and the kernel state that should be.

It holds what this AP knows of its roam domain: every AP's uplink session table, every client's
serving AP, and how far it is in sync. It does no I/O, reads no clock and draws no random number:
`step` takes an event and the time. The same events in another order, repeated or split, lead to the
same state, as far as their sources allow any order at all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import replace
from enum import StrEnum
from functools import singledispatchmethod
from ipaddress import IPv4Address
from itertools import islice

from apagent.core.anchoring import Anchoring
from apagent.core.clients import Client, ClientTable, Move
from apagent.core.desired import NetworkDelta, NetworkState, drain_changes, wanted
from apagent.core.digest import TableDigest
from apagent.core.domain import Domain, Network
from apagent.core.effects import (
    AskClient,
    Effect,
    EndFlows,
    ForgetClient,
    NotePeer,
    NoteRoam,
    NoteSync,
    Publish,
    WelcomeClient,
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
    client_of,
    socket_of,
    stamped,
    standing_of,
)
from apagent.core.roam import Verdict, judge
from apagent.core.session_tables import SessionTables

MAX_ADDRESSES = 16
"""IPv4 addresses per client; beyond that the lowest are dropped for a new one."""
MAX_ANNOUNCED = 64
"""Clients elsewhere that a client is told of when it arrives; it asks for the others by ARP."""
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
        self.clients = {n.name: ClientTable(self.me) for n in domain.networks}
        self.peers = dict.fromkeys(peers, PeerState.CONNECTING)
        self.clock = 0
        """The highest claim generation seen: a Lamport clock of the roam domain."""
        self.in_sync = False
        self._flows_listed = False
        self._heard: set[ApId] = set()
        self._seen_early: deque[ClientSeen] = deque(maxlen=MAX_EARLY_SIGHTINGS)
        self._now = 0.0
        self._effects: list[Effect] = []
        self._tables_out: dict[NetworkName, SessionChanges] = {}
        self._claims_out: list[Claim] = []
        self.anchoring = Anchoring(domain, self.sessions, self.clients)
        """All APs as anchors: who is alive, who anchors new flows, who holds which address."""
        for peer in peers:
            self.anchoring.hears(peer, hears=False)

    def step(self, event: Event, now: float) -> list[Effect]:
        """Take one event in; `now` is any clock in seconds, for display only."""
        self._now = now
        self._handle(event)
        self._effects += self.anchoring.settle(self.clock, in_sync=self.in_sync)
        self.clock = max(self.clock, self.anchoring.anchors.clock)
        for name, tables in self.sessions.items():
            if tables.lost:
                self._effects.append(EndFlows(name, tuple(sorted(tables.lost))))
                tables.lost.clear()
        effects, self._effects = self._effects, []
        stated = self.anchoring.statement_if_changed()
        if self._tables_out or self._claims_out or stated is not None:
            claims = tuple(self._claims_out)
            effects.append(Publish(self._tables_out, claims, self.clock, stated))
            self._tables_out, self._claims_out = {}, []
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
            self._release_silent(event.network)

    @_handle.register
    def _(self, event: FlowsListed) -> None:
        for name, tables in self.sessions.items():
            listed = self._stamp(name, event.tables.get(name, {}))
            standing = self.domain.network_by_name[name].standing
            flows = {key: nat for key, nat in listed.items() if nat is not None}
            self.anchoring.flows_listed(name, flows)
            changes = tables.replace(self.me, {**flows, **standing})
            if changes:
                self._tables_out[name] = changes
        self._flows_listed = True
        self._reach_sync()

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
        self._claim_provisionally(event.network, _by_mac(event.neighbours))
        if self.domain.network_by_name[event.network].takeover:
            self.anchoring.adopt(event.network, event.addresses)

    @_handle.register
    def _(self, event: ClientsFound) -> None:
        self._claim_provisionally(event.network, event.clients)

    # --- clients

    @_handle.register
    def _(self, event: ClientSeen) -> None:
        network = self.domain.network_by_name[event.network]
        if event.address is not None and not usable(network, event.address):
            return
        if self.in_sync:
            self._see(event)
            return
        self._seen_early.append(event)
        self.clients[event.network].aged.pop(event.mac, None)
        if event.source is not Source.DATA:
            addresses = _with_address(frozenset(), event.address)
            self._claim_provisionally(event.network, {event.mac: addresses})

    @_handle.register
    def _(self, event: ClientAged) -> None:
        clients = self.clients[event.network]
        client = clients.get(event.mac)
        if self._seen_early:
            gone = event.network, event.mac
            early = [seen for seen in self._seen_early if (seen.network, seen.mac) != gone]
            self._seen_early = deque(early, MAX_EARLY_SIGHTINGS)
        if client is not None and client.claim.ap == self.me:
            clients.aged[event.mac] = None
            self._release_silent(event.network)

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
            self.sessions[name].apply(event.peer, changes)

    @_handle.register
    def _(self, event: PeerSnapshot) -> None:
        for name, tables in self.sessions.items():
            if event.tables is not None:
                tables.replace(event.peer, event.tables.get(name, {}))
            self._release_silent(name)
        self._hear(event)
        for clients in self.clients.values():
            clients.drop_adopted_routes(event.peer)
        self.anchoring.hear(event.peer, event.anchor)
        self._heard.add(event.peer)
        self._set_peer(event.peer, PeerState.IN_SYNC)
        self._reach_sync()

    @_handle.register
    def _(self, event: PeerDelta) -> None:
        for name, changes in event.tables.items():
            self.sessions[name].apply(event.peer, changes)
            self._release_silent(name)
        self._hear(event)
        if event.anchor is not None:
            self.anchoring.hear(event.peer, event.anchor)
        self._heard.add(event.peer)
        self._set_peer(event.peer, PeerState.IN_SYNC)
        self._reach_sync()

    @_handle.register
    def _(self, _event: SyncTimedOut) -> None:
        self._heard.update(self.peers)
        self._reach_sync()

    # --- how claims are made, merged and ended

    def _see(self, event: ClientSeen) -> None:
        clients = self.clients[event.network]
        client = clients.get(event.mac)
        verdict = judge(event, client, self.me, self._now)
        if verdict is Verdict.IGNORE:
            return
        known = client.claim if client else None
        held = clients.addresses(client) if client else frozenset()
        addresses = _with_address(held, event.address)
        generation = self.clock + 1
        clients.aged.pop(event.mac, None)
        if verdict is Verdict.LEARN and known is not None:
            owner = None if event.address is None else clients.owner(event.address)
            if owner is None or owner is client:
                generation = known.generation
            if (generation, addresses) == (known.generation, known.addresses):
                return
        self._claim(Claim(event.network, event.mac, self.me, generation, addresses), event.source)

    def _claim(self, claim: Claim, source: str) -> None:
        self._claims_out.append(claim)
        self._merge(claim, source)

    def _claim_provisionally(
        self, network: NetworkName, found: Mapping[Mac, frozenset[IPv4Address]]
    ) -> None:
        for mac, addresses in found.items():
            client = self.clients[network].get(mac)
            if client is not None and (client.claim.ap != self.me or client.claim.generation):
                continue
            known = client.claim.addresses if client else frozenset()
            claim = Claim(network, mac, self.me, 0, known | addresses)
            if client is None or claim != client.claim:
                self._claim(claim, Source.NEIGHBOUR)

    def _hear(self, event: PeerSnapshot | PeerDelta) -> None:
        self.clock = max(self.clock, event.clock)
        for claim in event.claims:
            self._merge(claim, "peer")
        if isinstance(event, PeerSnapshot):
            for name, clients in self.clients.items():
                named = {claim.mac for claim in event.claims if claim.network == name}
                for claim in clients.unsaid(event.peer, named):
                    self._merge(claim, "peer")

    def _merge(self, claim: Claim, source: str) -> None:
        self.clock = max(self.clock, claim.generation)
        clients = self.clients[claim.network]
        before = clients.get(claim.mac)
        from_ap = before.claim.ap if before else None
        addresses = tuple(sorted(before.claim.addresses)) if before else ()
        owners = {address: clients.owner(address) for address in claim.addresses}
        client = clients.merge(claim, self._now)
        self._claims_out += clients.restated
        clients.restated.clear()
        if client is None:
            self._learn_from_stale(claim)
            return
        wins = client.claim
        for address, owner in owners.items():
            if owner not in (None, client) and clients.owner(address) is client:
                self._end_flows_of(claim.network, address)
        if from_ap == self.me and wins.ap != self.me:
            self._effects.append(ForgetClient(wins.network, wins.mac, addresses))
            asked = tuple(sorted(wins.addresses.union(addresses)))
            self._effects.append(AskClient(wins.network, wins.mac, asked))
        if from_ap != self.me and wins.ap == self.me and wins.generation:
            self._effects.append(
                WelcomeClient(
                    wins.network,
                    wins.mac,
                    tuple(sorted(wins.addresses)),
                    tuple(islice(clients.elsewhere(), MAX_ANNOUNCED)),
                )
            )
        to_ap = None if wins.released or wins.withdrawn else wins.ap
        if from_ap != to_ap:
            self._note_move(client, from_ap, to_ap, source)

    def _learn_from_stale(self, claim: Claim) -> None:
        """A claim that came too late may still know an address of our client that we don't."""
        clients = self.clients[claim.network]
        client = clients.get(claim.mac)
        if client is None or client.claim.ap != self.me or claim.released or claim.withdrawn:
            return
        known = client.claim.addresses
        news = frozenset(a for a in claim.addresses - known if clients.owner(a) is None)
        if news and len(known) + len(news) <= MAX_ADDRESSES:
            self._claim(replace(client.claim, addresses=known | news), "peer")

    def _note_move(
        self, client: Client, from_ap: ApId | None, to_ap: ApId | None, source: str
    ) -> None:
        claim = client.claim
        kept = sum(self.flows_of(client).values())
        client.moves.appendleft(Move(from_ap, to_ap, claim.generation, source, self._now, kept))
        self._effects.append(
            NoteRoam(
                claim.network,
                claim.mac,
                tuple(sorted(claim.addresses)),
                from_ap,
                to_ap,
                claim.generation,
                source,
                kept,
            )
        )

    def flows_of(self, client: Client) -> dict[ApId, int]:
        """Live sessions of a client by anchor."""
        totals: dict[ApId, int] = {}
        network = client.claim.network
        for address in self.clients[network].addresses(client):
            counts = self.sessions[network].flows_of(address.packed)
            for ap, count in counts.items():
                totals[ap] = totals.get(ap, 0) + count
        return totals

    def _end_flows_of(self, network: NetworkName, address: IPv4Address) -> None:
        """The address is another client's now: what the former one opened must not carry on."""
        own = self.sessions[network].table(self.me)
        flows = tuple(key for key in own if key[:4] == address.packed)
        if flows:
            self._effects.append(EndFlows(network, flows))

    def _stamp(self, network: NetworkName, changes: SessionChanges) -> dict[FlowKey, Nat | None]:
        """Note in each newly opened session the generation of its client's claim.

        What the first listing finds is older than any claim. What opens while we don't serve its
        client for certain may be some peer's: it yields to whoever has it too.
        """
        own, clients = self.sessions[network].table(self.me), self.clients[network]
        if not (own or self._flows_listed):
            return {key: nat and stamped(nat, 0) for key, nat in changes.items()}
        generations: dict[bytes, int] = {}
        result: dict[FlowKey, Nat | None] = {}
        for key, nat in changes.items():
            known = own.get(key)
            if nat is None or (known and known[TRANSLATION] == nat[TRANSLATION]):
                result[key] = nat and known and advanced(known, nat)
                continue
            address = client_of(key)
            if address not in generations:
                owner = clients.owner(IPv4Address(address))
                generations[address] = (owner.claim.generation if owner else 0) or MAX_GENERATION
            result[key] = stamped(nat, generations[address] if self._flows_listed else 0)
        return result

    def _release_silent(self, network: NetworkName) -> None:
        """Release the clients that have gone: aged by the bridge, and no session left anywhere."""
        if not self.in_sync:
            return
        clients = self.clients[network]
        for mac in tuple(clients.aged):
            client = clients.get(mac)
            if client is not None and not self._is_needed(client):
                self._claim(Claim(network, mac, self.me, self.clock + 1, released=True), Source.FDB)

    def _is_needed(self, client: Client) -> bool:
        sessions = self.sessions[client.claim.network]
        awaited = any(sessions.is_awaited(a.packed) for a in client.claim.addresses)
        return awaited or bool(self.flows_of(client))

    # --- sync

    def _reach_sync(self) -> None:
        if self.in_sync or not self._flows_listed or self._heard < self.peers.keys():
            return
        self.in_sync = True
        self.anchoring.reach_sync()
        for clients in self.clients.values():
            for client in tuple(clients):
                claim = client.claim
                if claim.ap == self.me and claim.generation == 0:
                    held = clients.addresses(client)
                    real = Claim(claim.network, claim.mac, self.me, self.clock + 1, held)
                    self._claim(real, Source.NEIGHBOUR)
        for sighting in self._seen_early:
            self._see(sighting)
        self._seen_early.clear()
        for name in self.clients:
            self._release_silent(name)
        missing = tuple(p for p, state in self.peers.items() if state is not PeerState.IN_SYNC)
        self._effects.append(NoteSync(missing))

    def _set_peer(self, peer: ApId, state: PeerState, reason: str = "") -> None:
        self.anchoring.hears(peer, hears=state is PeerState.IN_SYNC)
        if self.peers[peer] is not state:
            self.peers[peer] = state
            self._effects.append(NotePeer(peer, state, reason))


def usable(network: Network, address: IPv4Address) -> bool:
    """Whether a client of `network` may have this address."""
    return address in network.prefix and address not in (
        network.gateway,
        network.prefix.network_address,
        network.prefix.broadcast_address,
    )


def _with_address(
    known: frozenset[IPv4Address], address: IPv4Address | None
) -> frozenset[IPv4Address]:
    if address is None or address in known:
        return known
    kept = sorted(known)[-(MAX_ADDRESSES - 1) :]
    return frozenset({*kept, address})


def _by_mac(neighbours: Mapping[IPv4Address, Mac]) -> dict[Mac, frozenset[IPv4Address]]:
    clients: dict[Mac, frozenset[IPv4Address]] = {}
    for address, mac in neighbours.items():
        clients[mac] = clients.get(mac, frozenset()) | {address}
    return clients
