"""Where the clients of one network are: claims merged, addresses owned, kernel state derived.

A client's place has many writers: each AP that sees it associate claims it, one generation above
the highest it has seen. The highest (generation, AP id) wins on every AP, in whatever order
claims arrive, once or repeated. An address belongs to the client whose claim wins among those that
name it, so a lease that moves to another MAC moves with the newer claim.

Generation 0 is for provisional claims: what a restarted AP finds in its kernel before it has heard
its peers. They lose against every real claim.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address

from apagent.core.model import ApId, Claim, Mac

MAX_TOMBSTONES = 4096
"""Released clients that are remembered, so that a late claim doesn't bring them back."""
MAX_ROAMS = 16
"""Moves that are remembered per client, for the operator."""


@dataclass(frozen=True, slots=True)
class Move:
    """A change of serving AP as this AP learned it; `time` is the caller's clock in seconds."""

    from_ap: ApId | None
    to_ap: ApId | None
    generation: int
    source: str
    time: float
    flows_kept: int


@dataclass(slots=True)
class Client:
    """A client of the domain: the winning claim, and its history."""

    claim: Claim
    since: float
    moves: deque[Move] = field(default_factory=lambda: deque(maxlen=MAX_ROAMS))


@dataclass(frozen=True, slots=True)
class Place:
    """What an address means to the kernel: served here by a MAC, elsewhere by an AP, or neither."""

    mac: Mac | None = None
    ap: ApId | None = None
    confirmed: bool = False
    """Served here by a claim that is not provisional."""


class ClientTable:
    """The clients of one network as `me` knows them."""

    def __init__(self, me: ApId) -> None:
        self._me = me
        self._clients: dict[Mac, Client] = {}
        self._named: dict[IPv4Address, set[Mac]] = {}
        """Addresses -> the clients whose claims name them; mostly one."""
        self._tombstones: dict[Mac, Claim] = {}
        self._adopted_routes: dict[IPv4Address, ApId] = {}
        self.aged: set[Mac] = set()
        """Clients here that the bridge has forgotten; they leave when their last session ends."""
        self.touched: dict[IPv4Address, Place] = {}
        """Addresses whose place may have changed -> their place before."""

    def __iter__(self) -> Iterator[Client]:
        return iter(self._clients.values())

    def __len__(self) -> int:
        return len(self._clients)

    def get(self, mac: Mac) -> Client | None:
        """The client with this MAC, if any AP claims it."""
        return self._clients.get(mac)

    def owner(self, address: IPv4Address) -> Client | None:
        """The client that has this address."""
        clients = [self._clients[mac] for mac in self._named.get(address, ())]
        return max(clients, key=lambda client: client.claim.precedence, default=None)

    def elsewhere(self) -> Iterator[IPv4Address]:
        """The addresses of clients that other APs serve."""
        return (
            address
            for client in self
            if client.claim.ap != self._me
            for address in client.claim.addresses
        )

    def own_claims(self) -> list[Claim]:
        """What our feed says about clients: those that we serve, and those that left from us."""
        claims = [client.claim for client in self if client.claim.ap == self._me]
        return claims + [claim for claim in self._tombstones.values() if claim.ap == self._me]

    def place(self, address: IPv4Address) -> Place:
        """What the kernel should do with packets to this address."""
        owner = self.owner(address)
        if owner is not None:
            claim = owner.claim
            if claim.ap == self._me:
                return Place(mac=claim.mac, confirmed=claim.generation > 0)
            return Place(ap=claim.ap)
        return Place(ap=self._adopted_routes.get(address))

    def places(self) -> dict[IPv4Address, Place]:
        """The place of every address that has one."""
        addresses = {*self._named, *self._adopted_routes}
        return {address: self.place(address) for address in addresses}

    def merge(self, claim: Claim, now: float) -> Client | None:
        """Take `claim` in if it wins over what is known; None: it is stale or says nothing new."""
        known = self._clients.get(claim.mac)
        current = known.claim if known else self._tombstones.get(claim.mac)
        if current is not None and (claim.precedence < current.precedence or claim == current):
            return None
        self._tombstones.pop(claim.mac, None)
        self.aged.discard(claim.mac)
        self._name_addresses(claim, known.claim.addresses if known else frozenset())
        if claim.released:
            return self._release(claim)
        client = known or Client(claim, now)
        if client.claim.ap != claim.ap:
            client.since = now
        client.claim = claim
        self._clients[claim.mac] = client
        return client

    def adopt_routes(self, routes: Mapping[IPv4Address, ApId]) -> None:
        """Keep an earlier run's host routes until their APs speak. Call it once, first."""
        self._adopted_routes = dict(routes)

    def drop_adopted_routes(self, ap: ApId) -> None:
        """Stop keeping an earlier run's host routes to `ap`: it has said whom it serves."""
        stale = [address for address, via in self._adopted_routes.items() if via == ap]
        for address in stale:
            self._touch(address)
            del self._adopted_routes[address]

    def _release(self, claim: Claim) -> Client | None:
        self._tombstones[claim.mac] = claim
        if len(self._tombstones) > MAX_TOMBSTONES:
            del self._tombstones[next(iter(self._tombstones))]
        client = self._clients.pop(claim.mac, None)
        if client is not None:
            client.claim = claim
        return client

    def _name_addresses(self, claim: Claim, before: frozenset[IPv4Address]) -> None:
        after = frozenset() if claim.released else claim.addresses
        for address in before | after:
            self._touch(address)
        for address in before - after:
            self._named[address].discard(claim.mac)
            if not self._named[address]:
                del self._named[address]
        for address in after - before:
            self._named.setdefault(address, set()).add(claim.mac)

    def _touch(self, address: IPv4Address) -> None:
        if address not in self.touched:
            self.touched[address] = self.place(address)
