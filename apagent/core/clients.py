"""Where the clients of one network are: claims merged, addresses owned, kernel state derived.

A client's place has many writers: each AP that sees it associate claims it, one generation above
the highest it has seen. The highest (generation, AP id) wins on every AP, in whatever order
claims arrive, once or repeated. An address belongs to the client whose claim wins among those that
name it, so a lease that moves to another MAC moves with the newer claim.

What counts is what each AP says now: an AP that starts again without a claim that it had before
has withdrawn it. An AP that hears of a higher claim than its own says so; its own is outdone then,
and counts only where nothing better is known. So all come to the same winner, whatever they have
heard before, and an AP that forgets leaves nobody with a belief that it doesn't share.

Generation 0 is for provisional claims: what a restarted AP finds in its kernel before it has heard
its peers. They lose against every real claim, but not against those that are outdone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address

from apagent.core.model import ApId, Claim, Mac, Precedence

MAX_TOMBSTONES = 4096
"""Released clients that are remembered, so that a late claim doesn't bring them back."""
MAX_OUTDONE = 1024
"""Outdone claims of our own that we stand by; by then everybody has heard the higher ones."""
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
    """What an address means to the kernel: served here, elsewhere by an AP, or neither."""

    mac: Mac | None = None
    """Whose address it is; None: nobody's, or an earlier run's that didn't note it."""
    ap: ApId | None = None
    """The AP that serves it; None: this one, if anybody does."""
    confirmed: bool = False
    """Served here by a claim that is not provisional."""

    @property
    def neighbour(self) -> Mac | None:
        """The client, if it is here."""
        return self.mac if self.ap is None else None

    @property
    def known(self) -> Mac | None:
        """The client, if it is here for certain."""
        return self.mac if self.confirmed else None

    @property
    def elsewhere(self) -> Mac | None:
        """The client, if another AP serves it."""
        return None if self.ap is None else self.mac


_NOWHERE = Place()


class ClientTable:
    """The clients of one network as `me` knows them."""

    def __init__(self, me: ApId) -> None:
        self._me = me
        self._said: dict[Mac, dict[ApId, Claim]] = {}
        """What each AP says now of each client."""
        self._clients: dict[Mac, Client] = {}
        self._named: dict[IPv4Address, set[Mac]] = {}
        """Addresses -> the clients whose claims name them; mostly one."""
        self._released: dict[Mac, None] = {}
        """Those that have left the domain, the first of them first."""
        self._adopted: dict[IPv4Address, Place] = {}
        self.aged: dict[Mac, None] = {}
        """Clients here that the bridge has forgotten; they leave when their last session ends."""
        self._outdone: dict[Mac, None] = {}
        """Clients of which we say an outdone claim, the first of them first."""
        self.restated: list[Claim] = []
        """What we must say anew of clients, since others have claimed them or left them."""
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
        # Provisional claims of one AP may be equal.
        return max(clients, key=lambda c: (c.claim.precedence, c.claim.mac), default=None)

    def belongs_to(self, address: IPv4Address, mac: Mac | None) -> bool:
        """Whether the client with this MAC has the address."""
        owner = self.owner(address)
        return owner is not None and owner.claim.mac == mac

    def named(self, address: IPv4Address) -> Iterator[Client]:
        """The clients whose claims name this address."""
        return (self._clients[mac] for mac in tuple(self._named.get(address, ())))

    def addresses(self, client: Client) -> frozenset[IPv4Address]:
        """The addresses that its claim names and that no other client has by now."""
        return frozenset(a for a in client.claim.addresses if self.owner(a) is client)

    def elsewhere(self) -> Iterator[IPv4Address]:
        """The addresses of clients that other APs serve."""
        return (
            address
            for client in self
            if client.claim.ap != self._me
            for address in sorted(client.claim.addresses)
        )

    def own_claims(self) -> list[Claim]:
        """What our feed says about clients: those that we serve, and those that left from us."""
        return [said[self._me] for said in self._said.values() if self._me in said]

    def place(self, address: IPv4Address) -> Place:
        """What the kernel should do with packets to this address."""
        owner = self.owner(address)
        if owner is not None:
            claim = owner.claim
            if claim.ap == self._me:
                return Place(mac=claim.mac, confirmed=claim.generation > 0)
            return Place(mac=claim.mac, ap=claim.ap)
        return self._adopted.get(address, _NOWHERE)

    def places(self) -> dict[IPv4Address, Place]:
        """The place of every address that has one."""
        addresses = dict.fromkeys((*self._named, *self._adopted))
        return {address: self.place(address) for address in addresses}

    def merge(self, claim: Claim, now: float) -> Client | None:
        """Take in what an AP says of a client now; None: the winning claim is the same as before.

        A client that has left, or whose only claim was withdrawn, is returned with the claim that
        says so.
        """
        known = self._clients.get(claim.mac)
        best = self._hear(claim)
        if best is None or best.released:
            return self._drop(claim.mac, best or claim)
        if known is not None and known.claim == best:
            return None
        self._name_addresses(best, known.claim.addresses if known else frozenset())
        client = known or Client(best, now)
        if client.claim.ap != best.ap:
            client.since = now
        if best.ap != self._me:
            self.aged.pop(claim.mac, None)
        client.claim = best
        self._clients[claim.mac] = client
        return client

    def unsaid(self, ap: ApId, macs: Collection[Mac]) -> list[Claim]:
        """What `ap` has withdrawn if it claims the clients `macs` and no others."""
        return [
            _withdrawn(said[ap])
            for mac, said in self._said.items()
            if ap in said and mac not in macs
        ]

    def adopt_routes(
        self, routes: Mapping[IPv4Address, ApId], macs: Mapping[IPv4Address, Mac]
    ) -> None:
        """Keep an earlier run's host routes until their APs speak. Call it once, first.

        `macs` are the clients that the addresses belonged to, as far as it had noted them.
        """
        self._adopted = {a: Place(mac=macs.get(a), ap=ap) for a, ap in routes.items()}

    def drop_adopted_routes(self, ap: ApId) -> None:
        """Stop keeping an earlier run's host routes to `ap`: it has said whom it serves."""
        stale = [address for address, place in self._adopted.items() if place.ap == ap]
        for address in stale:
            self._touch(address)
            del self._adopted[address]

    def _hear(self, claim: Claim) -> Claim | None:
        """Note what an AP says now; returns the highest claim on its client, if there is one."""
        said = self._said.setdefault(claim.mac, {})
        said[claim.ap] = claim
        if claim.withdrawn:
            del said[claim.ap]
        if claim.ap == self._me:
            self._outdone.pop(claim.mac, None)
        self._judge_own(claim.mac, said)
        best = max(said.values(), key=_rank, default=None)
        if not said:
            del self._said[claim.mac]
        self._released.pop(claim.mac, None)
        if best is not None and best.released:
            self._remember_release(claim.mac)
        return best

    def _judge_own(self, mac: Mac, said: dict[ApId, Claim]) -> None:
        """Stand by our claim, call it outdone, or withdraw it: it is of no use to anybody then."""
        mine = said.get(self._me)
        if mine is None:
            return
        best = max(said.values(), key=_rank)
        helps = mine.outdone and best is not mine and not best.released
        if helps or (best is mine and not mine.outdone):
            return
        if best is mine or mine.released or best.released:
            self._withdraw(mac, said)
        else:
            said[self._me] = replace(mine, outdone=True)
            self.restated.append(said[self._me])
            self._outdone[mac] = None
            if len(self._outdone) > MAX_OUTDONE:
                oldest = next(iter(self._outdone))
                self._withdraw(oldest, self._said[oldest])

    def _withdraw(self, mac: Mac, said: dict[ApId, Claim]) -> None:
        self.restated.append(_withdrawn(said.pop(self._me)))
        self._outdone.pop(mac, None)

    def _remember_release(self, mac: Mac) -> None:
        self._released[mac] = None
        if len(self._released) > MAX_TOMBSTONES:
            oldest = next(iter(self._released))
            del self._released[oldest], self._said[oldest]

    def _drop(self, mac: Mac, why: Claim) -> Client | None:
        self.aged.pop(mac, None)
        client = self._clients.get(mac)
        if client is not None:
            self._name_addresses(why, client.claim.addresses)
            client.claim = why
            del self._clients[mac]
        return client

    def _name_addresses(self, claim: Claim, before: frozenset[IPv4Address]) -> None:
        after = frozenset() if claim.released or claim.withdrawn else claim.addresses
        for address in sorted(before | after):
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


def _rank(claim: Claim) -> tuple[bool, bool, Precedence]:
    return not claim.outdone, claim.generation > 0, claim.precedence


def _withdrawn(claim: Claim) -> Claim:
    return Claim(claim.network, claim.mac, claim.ap, claim.generation, withdrawn=True)
