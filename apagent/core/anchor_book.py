"""What every AP says of itself as an anchor, and what follows from that alone.

Our own side is here, too: what we state is made from it. Nothing is decided here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from apagent.core.domain import Domain
from apagent.core.model import (
    AnchorMode,
    AnchorStatement,
    ApId,
    Hold,
    NatAddress,
    NetworkAnchor,
    NetworkName,
    Precedence,
)

_MAX_LEFT = 256
"""Addresses that a peer has let go of and that are remembered: far more than a domain has."""


@dataclass(slots=True)
class OwnSide:
    """Our own side of the statements."""

    draining: bool = False
    reclaims: bool = False
    down: dict[NetworkName, str] = field(default_factory=dict)
    """Networks whose uplinks lead nowhere, and why."""
    holds: dict[NatAddress, Hold] = field(default_factory=dict)
    ready: set[NatAddress] = field(default_factory=set)
    taking: set[NatAddress] = field(default_factory=set)
    left: set[NatAddress] = field(default_factory=set)
    """Of others, and nobody holds them, but our conntrack table has flows that need them: an
    earlier run of ours died when it was about to take them."""
    unconfirmed: set[NatAddress] = field(default_factory=set)
    """Held, but not on our uplink: it was down, and somebody may have taken the address."""


class AnchorBook:
    """All statements of a domain's anchors, and who of them is alive."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.me = domain.me.id
        self.mine = OwnSide()
        self.statements: dict[ApId, AnchorStatement] = {}
        """The peers' latest; none: such a peer anchors, and has no part in takeovers."""
        self.dead: set[ApId] = set()
        """Peers whose kernels don't answer."""
        self.unheard: set[ApId] = set()
        """Peers whose agents we don't hear: they can't be relied on to take anything over."""
        self.latest: dict[NatAddress, int] = {}
        """The highest generation at which an address that is spoken of was held by anybody."""
        self._left: dict[ApId, set[NatAddress]] = {}
        """Addresses that a peer has let go of, and of which its heir hadn't been heard then."""
        self._void: dict[tuple[NatAddress, ApId], int] = {}
        """Generations of holds that higher ones have superseded, by whose they are."""

    def hear(self, ap: ApId, statement: AnchorStatement) -> None:
        """What a peer says of itself now. What it says anew stands against nothing earlier."""
        former = self.statements.get(ap, AnchorStatement())
        self.statements[ap] = statement
        held = {(hold.nat, ap): hold.generation for hold in statement.holds}
        gone = {hold.nat for hold in former.holds if (hold.nat, ap) not in held}
        left = self._left.get(ap, set()) | gone
        left = {n for n in left if (n, ap) not in held and self.holder(n) is None}
        self._left[ap] = left if len(left) <= _MAX_LEFT else left & gone
        for nat in self.latest.keys() - self.known() - self.peers_homes():
            del self.latest[nat]
        for key in [key for key in self._void if key[1] == ap and self._void[key] != held.get(key)]:
            del self._void[key]

    def statement(self) -> AnchorStatement:
        """What we say of ourselves."""
        mine = self.mine
        return AnchorStatement(
            tuple(
                NetworkAnchor(n.name, self.mode(n.name), n.nat_address if n.takeover else None)
                for n in self.domain.networks
            ),
            tuple(hold for _, hold in sorted(mine.holds.items())),
            frozenset(mine.ready),
            mine.reclaims,
            frozenset(mine.taking),
        )

    def mode(self, network: NetworkName) -> AnchorMode:
        """Whether we anchor flows of a network."""
        if network in self.mine.down:
            return AnchorMode.NO_UPLINK
        return AnchorMode.DRAINING if self.mine.draining else AnchorMode.ACTIVE

    def mode_of(self, ap: ApId, network: NetworkName) -> AnchorMode:
        """Whether an AP anchors flows of a network, as it says itself."""
        if ap == self.me:
            return self.mode(network)
        stated = self._stated(ap, network)
        return AnchorMode.ACTIVE if stated is None else stated.mode

    def trouble(self, network: NetworkName) -> str:
        """Why our uplink of a network is down; empty: it isn't."""
        return self.mine.down.get(network, "")

    def holder(self, nat: NatAddress) -> ApId | None:
        """Who holds an address, or is about to because its holder has let go of it."""
        found = self.hold_of(nat)
        if found is not None:
            return found[0]
        if nat in self.mine.ready:
            return self.me
        return min((ap for ap, s in self.statements.items() if nat in s.ready), default=None)

    def holds_of(self, ap: ApId) -> list[NatAddress]:
        """The addresses that an AP holds."""
        return [nat for nat in sorted(self.known()) if self.holder(nat) == ap]

    def home(self, nat: NatAddress) -> ApId | None:
        """The AP whose configuration names the address; None: it hasn't been heard."""
        if nat in self.homes():
            return self.me
        for ap, statement in self.statements.items():
            if NatAddress(nat.network, nat.address) in _homes(statement):
                return ap
        return None

    def is_home(self, nat: NatAddress) -> bool:
        """Whether our configuration names the address."""
        return nat in self.homes()

    def is_dead(self, ap: ApId, network: NetworkName) -> bool:
        """Whether the flows of this anchor are dead, unless another AP continues them."""
        return ap in self.dead or self.mode_of(ap, network) is AnchorMode.NO_UPLINK

    def successor(self, nat: NatAddress, holder: ApId, named: ApId | None) -> ApId | None:
        """Who takes an address over: who was named, or comes first by rendezvous hashing."""
        fit = [
            ap
            for ap in (self.me, *self.statements.keys() - self.unheard)
            if ap != holder and self.is_fit(ap, nat.network) and self.takes_over(ap, nat.network)
        ]
        if named in fit:
            return named
        return max(fit, key=lambda ap: _weight(str(nat), ap), default=None)

    def deputy(self, network: NetworkName) -> ApId | None:
        """The peer that anchors our clients' new flows while we don't."""
        fit = [ap for ap in self.domain.peer_by_id if self.is_fit(ap, network)]
        return max(fit, key=lambda ap: _weight(f"{network} of {self.me}", ap), default=None)

    def is_fit(self, ap: ApId, network: NetworkName) -> bool:
        """Whether an AP is alive and anchors new flows."""
        return ap not in self.dead and self.mode_of(ap, network) is AnchorMode.ACTIVE

    def being_taken(self, network: NetworkName) -> set[NatAddress]:
        """The addresses that an AP whose word can be relied on is about to take."""
        takers = self.statements.keys() - self.dead - self.unheard
        taking = self.mine.taking.union(*(self.statements[ap].taking for ap in takers))
        return {nat for nat in taking if nat.network == network}

    def takes_over(self, ap: ApId, network: NetworkName) -> bool:
        """Whether an AP takes part in takeovers."""
        if ap == self.me:
            return self.domain.network_by_name[network].takeover
        stated = self._stated(ap, network)
        return stated is not None and stated.nat is not None

    def may_take(self, network: NetworkName) -> bool:
        """Whether we may take addresses now."""
        return self.takes_over(self.me, network) and self.mode(network) is AnchorMode.ACTIVE

    def addresses_of(self, ap: ApId, network: NetworkName) -> list[NatAddress]:
        """The addresses whose flows are an AP's, its own address first.

        Those that it says that it holds, or is ready for and nobody holds; and those that it has
        let go of, as long as who continues them isn't known here: the two speak to us by feeds of
        their own.
        """
        statement = self.statement() if ap == self.me else self.statements.get(ap)
        if statement is None:
            return []
        homes = _homes(statement)
        held = {hold.nat for hold in statement.holds}
        left = {nat for nat in self._left.get(ap, ()) if self.holder(nat) is None}
        handed = {nat for nat in statement.ready if self.hold_of(nat) is None}
        its = [nat for nat in held | left | handed if nat.network == network]
        return sorted(its, key=lambda nat: (nat not in homes, nat))

    def hold_of(self, nat: NatAddress) -> tuple[ApId, Hold] | None:
        """The hold that counts, and whose it is.

        One that was superseded is void until its AP says another: what a dead AP said last still
        stands while its successor's agent is restarted, which then has a provisional hold only. So
        has one whose former run died before it could say that it has taken the address: whoever is
        there comes before whoever isn't.
        """
        gone = self.dead & self.unheard
        stated = [(ap, hold) for ap, hold in self._all_holds() if hold.nat == nat]
        self.latest[nat] = max((self.latest.get(nat, 0), *(h.generation for _, h in stated)))
        valid = [f for f in stated if f[1].generation != self._void.get((nat, f[0]))]
        highest = max((Precedence(h.generation, ap) for ap, h in valid), default=None)
        for ap, hold in valid:
            if hold.generation and highest is not None and ap != highest.ap:
                self._void[nat, ap] = hold.generation
        return max(
            (f for f in valid if f[1].generation != self._void.get((nat, f[0]))),
            key=lambda found: (found[0] not in gone, found[1].generation, found[0]),
            default=None,
        )

    def _all_holds(self) -> Iterator[tuple[ApId, Hold]]:
        for hold in self.mine.holds.values():
            yield self.me, hold
        for ap, statement in self.statements.items():
            for hold in statement.holds:
                yield ap, hold

    def known(self) -> set[NatAddress]:
        """All NAT addresses that anybody speaks of."""
        ready = {nat for statement in self.statements.values() for nat in statement.ready}
        held = {hold.nat for _, hold in self._all_holds()}
        return held | ready | self.homes() | self.mine.ready | self.mine.left

    def homes(self) -> set[NatAddress]:
        """The addresses that our configuration names."""
        return {
            NatAddress(n.name, n.nat_address)
            for n in self.domain.networks
            if n.takeover and n.nat_address is not None
        }

    def peers_homes(self) -> set[NatAddress]:
        """The addresses that the peers' configurations name."""
        homes = {nat for statement in self.statements.values() for nat in _homes(statement)}
        return {nat for nat in homes if nat.network in self.domain.network_by_name}

    def foreign_holds(self) -> set[NatAddress]:
        """The addresses that we hold and whose home is another AP."""
        return self.mine.holds.keys() - self.homes()

    def _stated(self, ap: ApId, network: NetworkName) -> NetworkAnchor | None:
        statement = self.statements.get(ap)
        networks = statement.networks if statement else ()
        return next((stated for stated in networks if stated.network == network), None)


def _homes(statement: AnchorStatement) -> set[NatAddress]:
    return {NatAddress(n.network, n.nat) for n in statement.networks if n.nat is not None}


def _weight(what: str, ap: ApId) -> bytes:
    """Rendezvous hashing: each AP's weight for `what`, the same on every AP."""
    return hashlib.blake2b(f"{what}/{ap}".encode(), digest_size=8).digest()
