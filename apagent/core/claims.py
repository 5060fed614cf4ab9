"""Claims: how this AP's are made, merged with those of its peers, and ended.

`core/roam.py` judges what a sighting means, `core/clients.py` which claim wins. Here is what
follows from it: the claims that our feed must say, and who has to be told of a client's move.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from ipaddress import IPv4Address
from itertools import islice

from apagent.core.clients import Client, ClientTable, Move
from apagent.core.domain import Domain, Network
from apagent.core.effects import (
    AskClient,
    Effect,
    EndFlows,
    Ending,
    ForgetClient,
    NoteRoam,
    WelcomeClient,
)
from apagent.core.events import ClientSeen, PeerDelta, PeerSnapshot, Source
from apagent.core.model import ApId, Claim, Mac, NetworkName
from apagent.core.roam import Verdict, judge
from apagent.core.session_tables import SessionTables

MAX_ADDRESSES = 16
"""IPv4 addresses per client; beyond that the lowest are dropped for a new one."""
MAX_ANNOUNCED = 64
"""Clients elsewhere that a client is told of when it arrives; it asks for the others by ARP."""


class Claims:
    """The clients of all networks, and what this AP says of them."""

    def __init__(self, domain: Domain, sessions: Mapping[NetworkName, SessionTables]) -> None:
        self._me = domain.me.id
        self._sessions = sessions
        self.clients = {n.name: ClientTable(self._me) for n in domain.networks}
        self.clock = 0
        """The highest claim generation seen: a Lamport clock of the roam domain."""
        self.now = 0.0
        """The time of the event that is being handled, in seconds of any clock."""
        self._news: list[Claim] = []
        self._effects: list[Effect] = []

    def take_news(self) -> tuple[Claim, ...]:
        """What our feed has to say since the last call."""
        news, self._news = tuple(self._news), []
        return news

    def take_effects(self) -> list[Effect]:
        """What has to be done since the last call."""
        effects, self._effects = self._effects, []
        return effects

    def see(self, event: ClientSeen) -> None:
        """A client was seen here: claim it, or learn its address, or ignore that."""
        clients = self.clients[event.network]
        client = clients.get(event.mac)
        verdict = judge(event, client, self._me, self.now)
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
        self._claim(Claim(event.network, event.mac, self._me, generation, addresses), event.source)

    def claim_provisionally(
        self, network: NetworkName, found: Mapping[Mac, frozenset[IPv4Address]]
    ) -> None:
        """Claim clients that were found here, at generation 0, which loses to every real claim."""
        for mac, addresses in found.items():
            client = self.clients[network].get(mac)
            if client is not None and (client.claim.ap != self._me or client.claim.generation):
                continue
            known = client.claim.addresses if client else frozenset()
            claim = Claim(network, mac, self._me, 0, known | addresses)
            if client is None or claim != client.claim:
                self._claim(claim, Source.NEIGHBOUR)

    def found_early(self, event: ClientSeen) -> None:
        """A client was seen here before we are in sync: what that means is judged later."""
        addresses = _with_address(frozenset(), event.address)
        self.claim_provisionally(event.network, {event.mac: addresses})

    def confirm(self) -> None:
        """Make real what was claimed provisionally and still stands: nobody claims it otherwise.

        At the highest generation heard, which is one below what an AP says that sees such a client
        at this very moment: it may have left us unnoticed while no agent ran here.
        """
        generation = max(1, self.clock)
        for clients in self.clients.values():
            for client in tuple(clients):
                claim = client.claim
                if claim.ap == self._me and claim.generation == 0:
                    held = clients.addresses(client)
                    real = Claim(claim.network, claim.mac, self._me, generation, held)
                    self._claim(real, Source.NEIGHBOUR)

    def hear(self, event: PeerSnapshot | PeerDelta) -> None:
        """Take in a peer's claims; what a snapshot doesn't say any more is withdrawn."""
        self.clock = max(self.clock, event.clock)
        for claim in event.claims:
            self._merge(claim, "peer")
        if isinstance(event, PeerSnapshot):
            for name, clients in self.clients.items():
                named = {claim.mac for claim in event.claims if claim.network == name}
                for claim in clients.unsaid(event.peer, named):
                    self._merge(claim, "peer")

    def release_silent(self, network: NetworkName) -> None:
        """Release the clients that have gone: aged by the bridge, and no session left anywhere.

        Looks at those alone whose sessions have ended since the last call: a busy AP has hundreds
        that sleep, and many batches a second.
        """
        silenced = self._sessions[network].silenced
        for address in sorted(silenced) if self.clients[network].aged else ():
            for client in self.clients[network].named(IPv4Address(address)):
                self.release_if_silent(network, client.claim.mac)
        silenced.clear()

    def release_if_silent(self, network: NetworkName, mac: Mac) -> None:
        """Release this client if it has gone."""
        client = self.clients[network].get(mac)
        if client is None or mac not in self.clients[network].aged or self._is_needed(client):
            return
        self._claim(Claim(network, mac, self._me, self.clock + 1, released=True), Source.FDB)

    def flows_of(self, client: Client) -> dict[ApId, int]:
        """Live sessions of a client by anchor."""
        totals: dict[ApId, int] = {}
        network = client.claim.network
        for address in self.clients[network].addresses(client):
            counts = self._sessions[network].flows_of(address.packed)
            for ap, count in counts.items():
                totals[ap] = totals.get(ap, 0) + count
        return totals

    def _claim(self, claim: Claim, source: str) -> None:
        self._news.append(claim)
        self._merge(claim, source)

    def _merge(self, claim: Claim, source: str) -> None:
        self.clock = max(self.clock, claim.generation)
        clients = self.clients[claim.network]
        before = clients.get(claim.mac)
        from_ap = before.claim.ap if before else None
        addresses = tuple(sorted(before.claim.addresses)) if before else ()
        owners = {address: clients.owner(address) for address in claim.addresses}
        client = clients.merge(claim, self.now)
        self._news += clients.restated
        clients.restated.clear()
        if client is None:
            self._learn_from_stale(claim)
            return
        wins = client.claim
        for address, owner in owners.items():
            if owner not in (None, client) and clients.owner(address) is client:
                self._end_flows_of(claim.network, address, claim.mac)
                self._sessions[claim.network].silenced.add(address.packed)
        if from_ap == self._me and wins.ap != self._me:
            self._has_left(wins, addresses)
        if from_ap != self._me and wins.ap == self._me and wins.generation:
            self._has_come(wins)
        to_ap = None if wins.released or wins.withdrawn else wins.ap
        if from_ap != to_ap:
            self._note_move(client, from_ap, to_ap, source)

    def _has_left(self, claim: Claim, addresses: tuple[IPv4Address, ...]) -> None:
        self._effects.append(ForgetClient(claim.network, claim.mac, addresses))
        asked = tuple(sorted(claim.addresses.union(addresses)))
        self._effects.append(AskClient(claim.network, claim.mac, asked))

    def _has_come(self, claim: Claim) -> None:
        elsewhere = islice(self.clients[claim.network].elsewhere(), MAX_ANNOUNCED)
        addresses = tuple(sorted(claim.addresses))
        self._effects.append(WelcomeClient(claim.network, claim.mac, addresses, tuple(elsewhere)))

    def _learn_from_stale(self, claim: Claim) -> None:
        """A claim that came too late may still know an address of our client that we don't."""
        clients = self.clients[claim.network]
        client = clients.get(claim.mac)
        if client is None or client.claim.ap != self._me or claim.released or claim.withdrawn:
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
        client.moves.appendleft(Move(from_ap, to_ap, claim.generation, source, self.now, kept))
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

    def _end_flows_of(self, network: NetworkName, address: IPv4Address, owner: Mac) -> None:
        """The address is another client's now: what the former one opened must not carry on."""
        own = self._sessions[network].table(self._me)
        flows = tuple(key for key in own if key[:4] == address.packed)
        if flows:
            self._effects.append(EndFlows(network, flows, Ending.OWNED, owner))

    def _is_needed(self, client: Client) -> bool:
        sessions = self._sessions[client.claim.network]
        awaited = any(sessions.is_awaited(a.packed) for a in client.claim.addresses)
        return awaited or bool(self.flows_of(client))


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
