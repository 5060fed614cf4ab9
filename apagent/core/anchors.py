"""Every AP as an anchor: who anchors new flows, who is dead, and who holds which NAT address.

Each AP states its own part (`AnchorStatement`): a mode for each network, the NAT addresses that it
holds, which of them it offers to whom, and for which offers it is ready. From all statements and
from who answers probes, each AP derives what it should do, without a vote:

- A NAT address that a living AP holds moves by an offer: the holder names the heir, the heir makes
  the flows ready in its conntrack table and says so, the holder lets go, the heir takes it. At no
  time do two APs hold it, and packets of its flows are translated throughout.
- A dead AP's address is taken by its successor, the first living one by rendezvous hashing (or the
  one that the dead AP had named), after ARP probes to which nobody answered. An address that still
  answers is left alone: its holder may be alive behind a broken tunnel.
- Where no successor can continue them, a dead anchor's flows fail fast.
- An AP that finds a higher hold of its address yields. So does one whose address somebody else
  announces while it can't hear all of its peers: they may have taken it over.

`settle` is the whole of it: it makes decisions until nothing changes. It is a function of what is
known, so it may be called any number of times.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from ipaddress import IPv4Address

from apagent.core.desired import ANY_ANCHOR, NOBODY, AnchorState
from apagent.core.domain import Domain
from apagent.core.effects import NoteAnchor
from apagent.core.model import (
    AnchorMode,
    AnchorStatement,
    ApId,
    Hold,
    Mac,
    NatAddress,
    NetworkAnchor,
    NetworkName,
)
from apagent.core.session_tables import AnchorRules

PATIENCE_ROUNDS = 20
"""Rounds of probes (2 s) that a dead anchor's flows wait for a successor before they are ended."""
RETRY_ROUNDS = 10
"""Rounds until an address that was in use, or flows that the kernel refused, are tried again."""
REMIND_ROUNDS = 10
"""Rounds between announcements of an address whose home can't be heard."""


class Want(Enum):
    """What `settle` asks for, beside changes of our own statement."""

    PROBE = auto()
    """Ask on the uplink's segment who uses the address."""
    ADOPT = auto()
    """Put the flows that `ap` translates to the address into our conntrack table."""
    END = auto()
    """End our flows that are translated to the address."""
    DEFEND = auto()
    """Announce the address again."""


@dataclass(frozen=True, slots=True)
class Decision:
    """One thing to do about a NAT address. `ap` is whose flows they are, for `Want.ADOPT`."""

    want: Want
    nat: NatAddress
    ap: ApId = NOBODY


class _Step(Enum):
    """How far we are in taking an address."""

    PROBING = auto()
    FREE = auto()
    ADOPTING = auto()
    ADOPTED = auto()
    WAITING = auto()


@dataclass(slots=True)
class _Trial:
    """Our way to an address; `until` is the round at which a `WAITING` one begins anew."""

    step: _Step
    until: int = 0


@dataclass(slots=True)
class _Mine:
    """Our own side of the statements."""

    draining: bool = False
    reclaims: bool = False
    down: dict[NetworkName, str] = field(default_factory=dict)
    holds: dict[NatAddress, Hold] = field(default_factory=dict)
    ready: set[NatAddress] = field(default_factory=set)
    unconfirmed: set[NatAddress] = field(default_factory=set)
    """Held, but not on our uplink: it was down, and somebody may have taken the address."""


class Anchors:
    """What this AP knows and decides of all APs as anchors."""

    def __init__(self, domain: Domain) -> None:
        self.me = domain.me.id
        self.clock = 0
        """The highest claim generation seen; `settle` counts it up."""
        self.dead: set[ApId] = set()
        """Peers whose kernels don't answer."""
        self.unheard: set[ApId] = set()
        """Peers whose agents we don't hear: they can't be relied on to take anything over."""
        self.statements: dict[ApId, AnchorStatement] = {}
        """The peers' latest; none: such a peer anchors, and has no part in takeovers."""
        self._domain = domain
        self._mine = _Mine()
        self._round = 0
        self._since: dict[tuple[ApId, NetworkName], int] = {}
        """Dead anchors -> the round since which they are."""
        self._trials: dict[NatAddress, _Trial] = {}
        self._latest: dict[NatAddress, int] = {}
        """The highest generation at which an address was held by anybody."""
        self._decisions: list[Decision] = []
        self.notes: list[NoteAnchor] = []
        """What the watchers should be told; whoever reads it clears it."""

    # --- what happens

    def pass_round(self) -> bool:
        """A round of probes is over; returns whether anything waits for rounds to pass."""
        self._round += 1
        waiting = any(trial.step is _Step.WAITING for trial in self._trials.values())
        dying = any(self._round - since <= PATIENCE_ROUNDS for since in self._since.values())
        return waiting or dying or bool(self._foreign_holds())

    def drain(self, *, drain: bool) -> None:
        """The operator wants us to anchor nothing, or to anchor again."""
        if drain != self._mine.draining:
            self._mine.draining = drain
            state = AnchorMode.DRAINING if drain else AnchorMode.ACTIVE
            what = "anchors no new flows" if drain else "anchors new flows again"
            self._note(state, what)

    def reclaim(self) -> None:
        """The operator wants our own addresses back."""
        self._mine.reclaims = True

    def uplink_changed(self, network: NetworkName, trouble: str) -> None:
        """A network's uplink works (no `trouble`) or not.

        While it was down nobody could ask us whether we have our addresses: they are asked for
        before they are used again.
        """
        mine = self._mine
        mine.unconfirmed |= {nat for nat in mine.holds if nat.network == network}
        if trouble:
            mine.down[network] = trouble
            self._drop_trials(network)
        else:
            mine.down.pop(network, None)
        what = f"the uplink of {network} " + (f"is down: {trouble}" if trouble else "works again")
        self._note(self.mode(network), what)

    def adopt(self, network: NetworkName, addresses: Collection[IPv4Address]) -> None:
        """Addresses that an earlier run of ours left on the uplink: held provisionally."""
        for address in addresses:
            nat = NatAddress(network, address)
            self._mine.holds.setdefault(nat, self._hold(nat, 0))

    def probed(self, nat: NatAddress, used_by: Mac | None) -> None:
        """The answer to `Want.PROBE`."""
        trial = self._trials.get(nat)
        if trial is None or trial.step is not _Step.PROBING:
            return
        if used_by is None:
            self._trials[nat] = _Trial(_Step.FREE)
            return
        if not trial.until:
            what = f"{nat} is in use by {used_by} on the uplink's segment and can't be taken"
            self._note("in-use", what)
        self._trials[nat] = self._wait()

    def adopted(self, nat: NatAddress) -> None:
        """The answer to `Want.ADOPT`: the flows are in our conntrack table."""
        if nat in self._trials:
            self._trials[nat] = _Trial(_Step.ADOPTED)

    def adoption_failed(self, nat: NatAddress, reason: str) -> None:
        """The answer to `Want.ADOPT`: they are not."""
        if nat in self._trials:
            self._note("refused", f"can't continue the flows of {nat}: {reason}")
            self._trials[nat] = self._wait()

    def conflict(self, nat: NatAddress, mac: Mac) -> None:
        """Somebody else uses an address of ours.

        If a peer that we can't hear may have taken over what is ours, it has: it has asked first,
        and we didn't answer. Whoever holds another one's address, or hears everybody, defends it.
        """
        if nat not in self._mine.holds or nat in self._mine.unconfirmed:
            return
        if nat in self._homes() and self.unheard:
            self._lose(nat, f"{mac} uses it, and we don't hear all peers")
            self._trials[nat] = self._wait()
        else:
            what = f"{mac} uses {nat}, which is ours: announced again"
            self._note("conflict", what)
            self._decisions.append(Decision(Want.DEFEND, nat))

    # --- what follows

    def settle(self, unused: Collection[NatAddress], *, in_sync: bool) -> list[Decision]:
        """Decide until nothing changes. `unused` addresses are those that no flow of ours needs."""
        for _ in range(len(self._known()) + 4):
            before = self.statement()
            for nat in sorted(self._known()):
                self._settle(nat, unused, in_sync=in_sync)
            if self.statement() == before:
                break
        self._note_deaths()
        self._remind()
        decisions, self._decisions = self._decisions, []
        return decisions

    def statement(self) -> AnchorStatement:
        """What we say of ourselves."""
        mine = self._mine
        return AnchorStatement(
            tuple(
                NetworkAnchor(n.name, self.mode(n.name), n.nat_address if n.takeover else None)
                for n in self._domain.networks
            ),
            tuple(hold for _, hold in sorted(mine.holds.items())),
            frozenset(mine.ready),
            mine.reclaims,
        )

    def mode(self, network: NetworkName) -> AnchorMode:
        """Whether we anchor flows of a network."""
        if network in self._mine.down:
            return AnchorMode.NO_UPLINK
        return AnchorMode.DRAINING if self._mine.draining else AnchorMode.ACTIVE

    def mode_of(self, ap: ApId, network: NetworkName) -> AnchorMode:
        """Whether an AP anchors flows of a network, as it says itself."""
        if ap == self.me:
            return self.mode(network)
        stated = self._stated(ap, network)
        return AnchorMode.ACTIVE if stated is None else stated.mode

    def trouble(self, network: NetworkName) -> str:
        """Why our uplink of a network is down; empty: it isn't."""
        return self._mine.down.get(network, "")

    def holder(self, nat: NatAddress) -> ApId | None:
        """Who holds an address, or is about to because its holder has let go of it."""
        found = self._holder(nat)
        if found is not None:
            return found[0]
        if nat in self._mine.ready:
            return self.me
        return min((ap for ap, s in self.statements.items() if nat in s.ready), default=None)

    def holds_of(self, ap: ApId) -> list[NatAddress]:
        """The addresses that an AP holds."""
        return [nat for nat in sorted(self._known()) if self.holder(nat) == ap]

    def home(self, nat: NatAddress) -> ApId | None:
        """The AP whose configuration names the address; None: it hasn't been heard."""
        if nat in self._homes():
            return self.me
        for ap, statement in self.statements.items():
            if NatAddress(nat.network, nat.address) in _homes(statement):
                return ap
        return None

    def is_home(self, nat: NatAddress) -> bool:
        """Whether our configuration names the address."""
        return nat in self._homes()

    def state(self, network: NetworkName) -> AnchorState:
        """What the kernel should hold because of all this."""
        found = self._domain.network_by_name[network]
        own = NatAddress(network, found.nat_address) if found.nat_address else None
        has_own = own in self._mine.holds and own not in self._mine.unconfirmed
        return AnchorState(
            diverted=self._diverted(network),
            addresses={
                nat.address: True
                for nat in self._mine.holds
                if nat.network == network and nat not in self._mine.unconfirmed
            },
            sources={found.uplink: own.address} if own is not None and has_own else {},
        )

    def rules(self, network: NetworkName) -> AnchorRules:
        """How to judge whose flow a flow is."""
        return AnchorRules(
            dead=frozenset(ap for ap in self._domain.peer_by_id if self.is_dead(ap, network)),
            holders={
                nat.address.packed: holder
                for nat in self._known()
                if nat.network == network and (holder := self.holder(nat)) is not None
            },
            prepared=frozenset(
                nat.address.packed
                for nat in {*self._mine.ready, *self._adopting()}
                if nat.network == network
            ),
            exposed=self.mode(network) is not AnchorMode.ACTIVE,
        )

    def is_dead(self, ap: ApId, network: NetworkName) -> bool:
        """Whether the flows of this anchor are dead, unless another AP continues them."""
        return ap in self.dead or self.mode_of(ap, network) is AnchorMode.NO_UPLINK

    def is_forsaken(self, ap: ApId, network: NetworkName) -> bool:
        """Whether a dead anchor's flows are continued by nobody: they are to fail fast.

        `ap` may be ourselves, with a dead uplink.
        """
        if not self.is_dead(ap, network) or self._heir(ap, network) is not None:
            return False
        return not self._may_be_continued(ap, network)

    # --- one address

    def _settle(self, nat: NatAddress, unused: Collection[NatAddress], *, in_sync: bool) -> None:
        found = self._holder(nat)
        if found is None:
            self._settle_vacant(nat, in_sync=in_sync)
        elif found[0] == self.me:
            self._settle_own(nat, found[1], unused, in_sync=in_sync)
        else:
            if nat in self._mine.holds:
                self._lose(nat, f"{found[0]} holds it")
            self._settle_foreign(nat, *found, in_sync=in_sync)

    def _settle_own(
        self, nat: NatAddress, hold: Hold, unused: Collection[NatAddress], *, in_sync: bool
    ) -> None:
        if in_sync and not hold.generation:
            hold = self._take(nat)
        if nat in self._mine.unconfirmed:
            self._confirm(nat)
            hold = self._mine.holds.get(nat, hold)
        target = self._wanted_heir(nat, hold, unused) if in_sync else None
        if target != hold.offered_to:
            self._mine.holds[nat] = replace(hold, offered_to=target)
            if target is not None:
                self._note("offered", f"offers {nat} to {target}")
        if target is not None and nat in self.statements[target].ready:
            self._lose(nat, f"{target} goes on with it")

    def _confirm(self, nat: NatAddress) -> None:
        """Our uplink was down: ask before the address is used again."""
        if nat.network in self._mine.down:
            return
        if self._try_out(nat):
            del self._trials[nat]
            self._mine.unconfirmed.discard(nat)

    def _settle_foreign(self, nat: NatAddress, ap: ApId, hold: Hold, *, in_sync: bool) -> None:
        if not in_sync or not self._may_take(nat.network):
            self._give_up(nat)
        elif hold.offered_to == self.me and ap not in self.dead:
            self._prepare(nat, ap)
        elif ap in self.dead and self._successor(nat, ap, hold.successor) == self.me:
            if nat in self._mine.ready or (self._try_out(nat) and self._have_adopted(nat, ap)):
                self._take(nat)
        else:
            self._give_up(nat)

    def _settle_vacant(self, nat: NatAddress, *, in_sync: bool) -> None:
        if nat in self._mine.ready:
            self._take(nat)
        elif nat in self._homes() and in_sync and self.mode(nat.network) is AnchorMode.ACTIVE:
            if self._try_out(nat):
                self._take(nat)
        else:
            self._give_up(nat)

    def _prepare(self, nat: NatAddress, ap: ApId) -> None:
        """The address is offered to us: have its flows ready."""
        if nat in self._mine.ready:
            return
        if nat not in self._trials:
            self._trials[nat] = _Trial(_Step.FREE)
        if self._have_adopted(nat, ap):
            self._mine.ready.add(nat)
            del self._trials[nat]

    def _try_out(self, nat: NatAddress) -> bool:
        """Ask on the segment for the address; returns whether nobody has answered."""
        trial = self._trials.get(nat)
        if trial is None or (trial.step is _Step.WAITING and trial.until <= self._round):
            self._trials[nat] = _Trial(_Step.PROBING, trial.until if trial else 0)
            self._decisions.append(Decision(Want.PROBE, nat))
            return False
        return trial.step in (_Step.FREE, _Step.ADOPTING, _Step.ADOPTED)

    def _have_adopted(self, nat: NatAddress, ap: ApId) -> bool:
        """Put the flows into our conntrack table; returns whether they are there."""
        trial = self._trials[nat]
        waited = trial.step is _Step.WAITING and trial.until <= self._round
        if trial.step is _Step.FREE or waited:
            self._trials[nat] = _Trial(_Step.ADOPTING)
            self._decisions.append(Decision(Want.ADOPT, nat, ap))
        return self._trials[nat].step is _Step.ADOPTED

    def _take(self, nat: NatAddress) -> Hold:
        self.clock = max(self.clock, self._latest.get(nat, 0)) + 1
        hold = self._mine.holds[nat] = self._hold(nat, self.clock)
        self._mine.ready.discard(nat)
        self._mine.unconfirmed.discard(nat)
        self._trials.pop(nat, None)
        if self._homes() <= self._mine.holds.keys():
            self._mine.reclaims = False
        self._note("holds", f"holds {nat}")
        return hold

    def _note(self, state: str, what: str) -> None:
        self.notes.append(NoteAnchor(self.me, state, what))

    def _lose(self, nat: NatAddress, why: str) -> None:
        """Another AP holds the address, or is about to: what we translate to it ends here."""
        self._note("lets-go", f"lets go of {nat}: {why}")
        del self._mine.holds[nat]
        self._mine.unconfirmed.discard(nat)
        self._trials.pop(nat, None)
        self._decisions.append(Decision(Want.END, nat))

    def _give_up(self, nat: NatAddress) -> None:
        """We are not to take the address (any more): flows made ready for it end here."""
        trial = self._trials.pop(nat, None)
        adopted = trial is not None and trial.step in (_Step.ADOPTING, _Step.ADOPTED)
        if nat in self._mine.ready or adopted:
            self._mine.ready.discard(nat)
            self._decisions.append(Decision(Want.END, nat))

    def _hold(self, nat: NatAddress, generation: int) -> Hold:
        network = self._domain.network_by_name[nat.network]
        return Hold(nat, generation, successor=network.successor)

    def _wait(self) -> _Trial:
        """Try again later. A trial that has waited before keeps quiet about it."""
        return _Trial(_Step.WAITING, self._round + RETRY_ROUNDS)

    # --- who comes next

    def _wanted_heir(
        self, nat: NatAddress, hold: Hold, unused: Collection[NatAddress]
    ) -> ApId | None:
        """Whom to offer an address of ours to; None: it stays."""
        if self.mode(nat.network) is not AnchorMode.ACTIVE:
            return self._successor(nat, self.me, hold.successor)
        home = self.home(nat)
        if home in (None, self.me) or not self._is_fit(home, nat.network):
            return None
        return home if nat in unused or self.statements[home].reclaims else None

    def _successor(self, nat: NatAddress, holder: ApId, named: ApId | None) -> ApId | None:
        """Who takes an address over: who was named, or comes first by rendezvous hashing."""
        fit = [
            ap
            for ap in (self.me, *self.statements.keys() - self.unheard)
            if ap != holder and self._is_fit(ap, nat.network) and self._takes_over(ap, nat.network)
        ]
        if named in fit:
            return named
        return max(fit, key=lambda ap: _weight(str(nat), ap), default=None)

    def _deputy(self, network: NetworkName) -> ApId | None:
        """The peer that anchors our clients' new flows while we don't."""
        fit = [ap for ap in self._domain.peer_by_id if self._is_fit(ap, network)]
        return max(fit, key=lambda ap: _weight(f"{network} of {self.me}", ap), default=None)

    def _is_fit(self, ap: ApId, network: NetworkName) -> bool:
        return ap not in self.dead and self.mode_of(ap, network) is AnchorMode.ACTIVE

    def _takes_over(self, ap: ApId, network: NetworkName) -> bool:
        if ap == self.me:
            return self._domain.network_by_name[network].takeover
        stated = self._stated(ap, network)
        return stated is not None and stated.nat is not None

    def _may_take(self, network: NetworkName) -> bool:
        return self._takes_over(self.me, network) and self.mode(network) is AnchorMode.ACTIVE

    # --- dead anchors

    def _diverted(self, network: NetworkName) -> dict[ApId, ApId]:
        diverted: dict[ApId, ApId] = {}
        deputy = None if self.mode(network) is AnchorMode.ACTIVE else self._deputy(network)
        if deputy is not None:
            diverted[ANY_ANCHOR] = deputy
        for ap in self._domain.peer_by_id:
            heir = self._heir(ap, network) if self.is_dead(ap, network) else None
            if heir is not None:
                diverted[ap] = NOBODY if heir == self.me else heir
            elif self.is_forsaken(ap, network):
                diverted[ap] = deputy or NOBODY
        return diverted

    def _heir(self, ap: ApId, network: NetworkName) -> ApId | None:
        """Who continues the flows of a dead anchor: whoever holds what it held."""
        heirs = [self.holder(nat) for nat in self._stated_holds(ap, network)]
        return next((heir for heir in heirs if heir not in (None, ap)), None)

    def _may_be_continued(self, ap: ApId, network: NetworkName) -> bool:
        """Whether a successor of a dead anchor may still be on its way."""
        if self._round - self._since.get((ap, network), self._round) >= PATIENCE_ROUNDS:
            return False
        return any(
            self._successor(nat, ap, None) is not None for nat in self._stated_holds(ap, network)
        )

    def _stated_holds(self, ap: ApId, network: NetworkName) -> list[NatAddress]:
        """What an AP says that it holds, its own address first."""
        statement = self.statement() if ap == self.me else self.statements.get(ap)
        if statement is None:
            return []
        homes = _homes(statement)
        held = [hold.nat for hold in statement.holds if hold.nat.network == network]
        return sorted(held, key=lambda nat: (nat not in homes, nat))

    def _note_deaths(self) -> None:
        for ap in (self.me, *self._domain.peer_by_id):
            for network in self._domain.network_by_name:
                if not self.is_dead(ap, network):
                    self._since.pop((ap, network), None)
                else:
                    self._since.setdefault((ap, network), self._round)

    def _remind(self) -> None:
        """Whoever lost contact and comes back must learn whose its address is now."""
        if self._round % REMIND_ROUNDS == 0:
            for nat in self._foreign_holds():
                self._decisions.append(Decision(Want.DEFEND, nat))

    # --- views

    def _holder(self, nat: NatAddress) -> tuple[ApId, Hold] | None:
        """The hold that counts, and whose it is.

        One that was superseded once is void for good: what a dead AP said last still stands while
        its successor's agent is restarted, which then has a provisional hold only.
        """
        stated = [(ap, hold) for ap, hold in self._all_holds() if hold.nat == nat]
        latest = max((hold.generation for _, hold in stated), default=0)
        latest = self._latest[nat] = max(latest, self._latest.get(nat, 0))
        valid = (found for found in stated if found[1].generation in (0, latest))
        return max(valid, key=lambda found: (found[1].generation, found[0]), default=None)

    def _all_holds(self) -> Iterator[tuple[ApId, Hold]]:
        for hold in self._mine.holds.values():
            yield self.me, hold
        for ap, statement in self.statements.items():
            for hold in statement.holds:
                yield ap, hold

    def _known(self) -> set[NatAddress]:
        ready = {nat for statement in self.statements.values() for nat in statement.ready}
        held = {hold.nat for _, hold in self._all_holds()}
        return held | ready | self._homes() | self._mine.ready

    def _homes(self) -> set[NatAddress]:
        """The addresses that our configuration names."""
        return {
            NatAddress(n.name, n.nat_address)
            for n in self._domain.networks
            if n.takeover and n.nat_address is not None
        }

    def _foreign_holds(self) -> set[NatAddress]:
        return self._mine.holds.keys() - self._homes()

    def _adopting(self) -> set[NatAddress]:
        steps = (_Step.ADOPTING, _Step.ADOPTED)
        return {nat for nat, trial in self._trials.items() if trial.step in steps}

    def _drop_trials(self, network: NetworkName) -> None:
        for nat in [nat for nat in self._trials if nat.network == network]:
            self._give_up(nat)

    def _stated(self, ap: ApId, network: NetworkName) -> NetworkAnchor | None:
        statement = self.statements.get(ap)
        networks = statement.networks if statement else ()
        return next((stated for stated in networks if stated.network == network), None)


def _homes(statement: AnchorStatement) -> set[NatAddress]:
    return {NatAddress(n.network, n.nat) for n in statement.networks if n.nat is not None}


def _weight(what: str, ap: ApId) -> bytes:
    """Rendezvous hashing: each AP's weight for `what`, the same on every AP."""
    return hashlib.blake2b(f"{what}/{ap}".encode(), digest_size=8).digest()
