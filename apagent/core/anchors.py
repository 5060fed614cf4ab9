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

from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import Enum, auto
from ipaddress import IPv4Address

from apagent.core.anchor_book import AnchorBook
from apagent.core.dead_anchors import DeadAnchors
from apagent.core.desired import NOBODY, AnchorState
from apagent.core.domain import Domain
from apagent.core.effects import NoteAnchor
from apagent.core.model import (
    AnchorMode,
    ApId,
    Hold,
    Mac,
    NatAddress,
    NetworkName,
)
from apagent.core.session_tables import AnchorRules

RETRY_ROUNDS = 10
"""Rounds until an address that was in use, or flows that the kernel refused, are tried again."""
DEFEND_ROUNDS = 10
"""Rounds between announcements of an address that somebody else announces, too: two that defend
themselves at once would flood the segment (RFC 5227, section 2.4: every ten seconds)."""
STALE_ROUNDS = 3
"""Rounds for which an address that we have just taken isn't yielded: what is heard then may have
been said before, by who has let go of it. Who really has it, too, says so every second."""
REMIND_ROUNDS = 10
"""Rounds between announcements of an address whose home can't be heard."""


class Want(Enum):
    """What `settle` asks for, beside changes of our own statement."""

    PROBE = auto()
    """Ask on the uplink's segment who uses the address."""
    ADOPT = auto()
    """Put the flows that `ap` translates to the address into our conntrack table."""
    LOOSEN = auto()
    """Have conntrack be content with half of the packets of our flows of the address."""
    END = auto()
    """End our flows that are translated to the address."""
    DEFEND = auto()
    """Announce the address again."""


@dataclass(frozen=True, slots=True)
class Decision:
    """One thing to do about a NAT address.

    `ap` is whose flows they are, for `Want.ADOPT`; for `Want.END`, who may have them as well, which
    is judged flow by flow.
    """

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
    """Our way to an address."""

    step: _Step
    until: int = 0
    """The round at which a `WAITING` one begins anew; of another one: it has waited before."""


class Anchors:
    """Decides what this AP does as an anchor, and about others."""

    def __init__(self, domain: Domain) -> None:
        self.book = AnchorBook(domain)
        """What all APs say of themselves."""
        self.dead_anchors = DeadAnchors(self.book)
        """The dead among them."""
        self.clock = 0
        """The highest claim generation seen; `settle` counts it up."""
        self.deaf: set[NetworkName] = set()
        """Networks whose uplinks led nowhere at the last look, if only for a moment: that nobody
        has answered there proves nothing."""
        self.notes: list[NoteAnchor] = []
        """What the watchers should be told; whoever reads it clears it."""
        self._round = 0
        self._trials: dict[NatAddress, _Trial] = {}
        self._decisions: list[Decision] = []
        self._defended: dict[NatAddress, int] = {}
        """The round at which we have announced an address because of a conflict."""
        self._taken: dict[NatAddress, int] = {}
        """The round at which we have taken an address."""
        self._untold: dict[NatAddress, set[ApId]] = {}
        """Addresses of ours -> the peers that we didn't hear when we took them. They may know of a
        higher hold, though nobody has it any more."""
        self._yielded: dict[NatAddress, ApId] = {}
        """Addresses that aren't ours -> their holder when we ended what we translate to them."""

    # --- what happens

    def pass_round(self) -> bool:
        """A round of probes is over; returns whether anything waits for rounds to pass."""
        self._round += 1
        waiting = any(trial.step is _Step.WAITING for trial in self._trials.values())
        dying = self.dead_anchors.pass_round()
        return waiting or dying or bool(self.book.foreign_holds())

    def drain(self, *, drain: bool) -> None:
        """The operator wants us to anchor nothing, or to anchor again."""
        if drain != self.book.mine.draining:
            self.book.mine.draining = drain
            self.book.mine.reclaims = False
            state = AnchorMode.DRAINING if drain else AnchorMode.ACTIVE
            what = "anchors no new flows" if drain else "anchors new flows again"
            self._note(state, what)

    def reclaim(self) -> None:
        """The operator wants our own addresses back; those that we hold need no asking."""
        self.book.mine.reclaims = not self.book.homes() <= self.book.mine.holds.keys()

    def uplink_changed(self, network: NetworkName, trouble: str) -> None:
        """A network's uplink works (no `trouble`) or not.

        While it was down nobody could ask us whether we have our addresses: they are asked for
        before they are used again.
        """
        mine = self.book.mine
        mine.unconfirmed |= {nat for nat in mine.holds if nat.network == network}
        if trouble:
            mine.down[network] = trouble
            self._drop_trials(network)
        else:
            mine.down.pop(network, None)
        what = f"the uplink of {network} " + (f"is down: {trouble}" if trouble else "works again")
        self._note(self.book.mode(network), what)

    def adopt(self, network: NetworkName, addresses: Collection[IPv4Address]) -> None:
        """Addresses that an earlier run of ours left on the uplink: held provisionally."""
        for address in addresses:
            nat = NatAddress(network, address)
            self.book.mine.holds.setdefault(nat, self._hold(nat, 0))

    def probed(self, nat: NatAddress, used_by: Mac | None) -> None:
        """The answer to `Want.PROBE`."""
        trial = self._trials.get(nat)
        if trial is None or trial.step is not _Step.PROBING:
            return
        if used_by is None and nat.network not in self.deaf:
            trial.step = _Step.FREE
            return
        if not trial.until and used_by is not None:
            what = f"{nat} is in use by {used_by} on the uplink's segment and can't be taken"
            self._note("in-use", what)
        self._trials[nat] = self._wait()

    def adopted(self, nat: NatAddress) -> None:
        """The answer to `Want.ADOPT`: the flows are in our conntrack table.

        It may come late: by then the address may have to be asked for again.
        """
        trial = self._trials.get(nat)
        if trial is not None and trial.step is _Step.ADOPTING:
            trial.step = _Step.ADOPTED

    def is_wanted(self, nat: NatAddress) -> bool:
        """Whether flows that are translated to the address belong here, now or soon."""
        return nat in {*self.book.mine.holds, *self.book.mine.ready, *self._adopting()}

    def adoption_failed(self, nat: NatAddress, reason: str) -> None:
        """The answer to `Want.ADOPT`: they are not."""
        self._note("refused", f"can't continue the flows of {nat}: {reason}")
        if nat in self._trials:
            self._trials[nat] = self._wait()

    def conflict(self, nat: NatAddress, mac: Mac) -> None:
        """Somebody else uses an address of ours.

        If a peer that we can't hear may have taken over what is ours, it has: it has asked first,
        and we didn't answer. Whoever holds another one's address, or hears everybody, defends it.
        """
        if nat not in self.book.mine.holds or nat in self.book.mine.unconfirmed:
            return
        stale = self._round - self._taken.get(nat, -STALE_ROUNDS) < STALE_ROUNDS
        if nat in self.book.homes() and self.book.unheard and not stale:
            self._lose(nat, f"{mac} uses it, and we don't hear all peers")
            self._trials[nat] = self._wait()
        elif self._round - self._defended.get(nat, -DEFEND_ROUNDS) >= DEFEND_ROUNDS:
            self._defended[nat] = self._round
            what = f"{mac} uses {nat}, which is ours: announced again"
            self._note("conflict", what)
            self._decisions.append(Decision(Want.DEFEND, nat))

    # --- what follows

    @property
    def awaits_home(self) -> bool:
        """Whether we are about to take an address of our own that nobody has.

        What opens before that is translated to an address that doesn't move.
        """
        return any(
            self.book.mode(nat.network) is AnchorMode.ACTIVE
            and self.book.hold_of(nat) is None
            and not self._trials.get(nat, _Trial(_Step.PROBING)).until
            for nat in self.book.homes()
        )

    def settle(self, unused: Collection[NatAddress], *, in_sync: bool) -> list[Decision]:
        """Decide until nothing changes. `unused` addresses are those that no flow of ours needs."""
        for _ in range(len(self.book.known()) + 4):
            before = self.book.statement()
            for nat in sorted(self.book.known()):
                self._settle(nat, unused, in_sync=in_sync)
            if self.book.statement() == before:
                break
        for nat in self._yielded.keys() - self.book.known():
            del self._yielded[nat]
        # Who has failed before may fail again: nobody is to wait for that.
        self.book.mine.taking = {n for n in self._adopting() if not self._trials[n].until}
        self.dead_anchors.note_deaths()
        self._remind()
        decisions, self._decisions = self._decisions, []
        return decisions

    def state(self, network: NetworkName) -> AnchorState:
        """What the kernel should hold because of all this."""
        found = self.book.domain.network_by_name[network]
        own = NatAddress(network, found.nat_address) if found.nat_address else None
        has_own = own in self.book.mine.holds and own not in self.book.mine.unconfirmed
        return AnchorState(
            diverted=self.dead_anchors.diverted(network),
            addresses={
                nat.address: True
                for nat in self.book.mine.holds
                if nat.network == network and nat not in self.book.mine.unconfirmed
            },
            sources={found.uplink: own.address} if own is not None and has_own else {},
        )

    def held(self, network: NetworkName) -> set[IPv4Address]:
        """The addresses that we hold, or are ready for."""
        mine = self.book.mine
        return {nat.address for nat in {*mine.holds, *mine.ready} if nat.network == network}

    def left(self, network: NetworkName) -> set[IPv4Address]:
        """Those that an earlier run of ours was about to take, and that nobody holds."""
        return {nat.address for nat in self.book.mine.left if nat.network == network}

    def coming(self, network: NetworkName) -> set[IPv4Address]:
        """The addresses whose flows are being made ready."""
        return {nat.address for nat in self._adopting() if nat.network == network}

    def rules(self, network: NetworkName) -> AnchorRules:
        """How to judge whose flow a flow is."""
        return AnchorRules(
            dead=frozenset(
                ap for ap in self.book.domain.peer_by_id if self.book.is_dead(ap, network)
            ),
            holders={
                nat.address.packed: holder
                for nat in self.book.known()
                if nat.network == network and (holder := self.book.holder(nat)) is not None
            },
            prepared=frozenset(
                nat.address.packed
                for nat in {*self.book.mine.ready, *self._adopting()}
                if nat.network == network
            ),
            exposed=self.book.mode(network) is not AnchorMode.ACTIVE,
        )

    # --- one address

    def _settle(self, nat: NatAddress, unused: Collection[NatAddress], *, in_sync: bool) -> None:
        found = self.book.hold_of(nat)
        if found is None:
            self._settle_vacant(nat, in_sync=in_sync)
        elif found[0] == self.book.me:
            self._settle_own(nat, found[1], unused, in_sync=in_sync)
        else:
            self.book.mine.left.discard(nat)
            if nat in self.book.mine.holds:
                self._lose(nat, f"{found[0]} holds it")
            self._settle_foreign(nat, *found, in_sync=in_sync)

    def _settle_own(
        self, nat: NatAddress, hold: Hold, unused: Collection[NatAddress], *, in_sync: bool
    ) -> None:
        if nat in self.book.mine.unconfirmed:
            self._confirm(nat)
        elif in_sync and (not hold.generation or self._is_told(nat)):
            if not hold.generation:
                # An earlier run may have died before it could announce what it had taken.
                self._decisions.append(Decision(Want.DEFEND, nat))
            hold = self._take(nat)
        target = self._wanted_heir(nat, hold, unused) if in_sync else None
        if target != hold.offered_to:
            self.book.mine.holds[nat] = replace(hold, offered_to=target)
            if target is not None:
                self._note("offered", f"offers {nat} to {target}")
                self._decisions.append(Decision(Want.LOOSEN, nat))
        if target is not None and nat in self.book.statements[target].ready:
            self._lose(nat, f"{target} goes on with it")

    def _confirm(self, nat: NatAddress) -> None:
        """Our uplink was down: ask before the address is used again."""
        if nat.network in self.book.mine.down:
            return
        if self._try_out(nat):
            del self._trials[nat]
            self.book.mine.unconfirmed.discard(nat)

    def _settle_foreign(self, nat: NatAddress, ap: ApId, hold: Hold, *, in_sync: bool) -> None:
        if not in_sync or not self.book.may_take(nat.network):
            self._give_up(nat)
            self._yield_to(nat, ap, in_sync=in_sync)
        elif hold.offered_to == self.book.me and ap not in self.book.dead:
            self._prepare(nat, ap)
        elif ap in self.book.dead and self.book.successor(nat, ap, hold.successor) == self.book.me:
            self._succeed(nat, ap)
        else:
            self._give_up(nat)
            self._yield_to(nat, ap, in_sync=in_sync)

    def _succeed(self, nat: NatAddress, dead: ApId) -> None:
        if nat in self.book.mine.ready or (self._try_out(nat) and self._have_adopted(nat, dead)):
            self._take(nat)

    def _is_told(self, nat: NatAddress) -> bool:
        """Whether a peer has been heard that we hadn't heard when we took the address.

        It may have seen a higher hold, and count ours as void: we take the address above that one.
        """
        return not self._untold.get(nat, set()) <= self.book.unheard

    def _yield_to(self, nat: NatAddress, holder: ApId, *, in_sync: bool) -> None:
        """What an earlier run of ours made ready for another AP's address must end, too."""
        if in_sync and self._yielded.get(nat) != holder:
            self._yielded[nat] = holder
            self._decisions.append(Decision(Want.END, nat, holder))

    def _settle_vacant(self, nat: NatAddress, *, in_sync: bool) -> None:
        heir = self.book.holder(nat)
        if nat in self.book.mine.ready:
            self._take(nat)
        elif (
            nat in self.book.homes() | self.book.mine.left
            and in_sync
            and self.book.mode(nat.network) is AnchorMode.ACTIVE
        ):
            if self._try_out(nat):
                self._take(nat)
        elif (
            # Whoever was ready has died before it could say that it holds the address.
            heir is not None
            and heir in self.book.dead & self.book.unheard
            and in_sync
            and self.book.may_take(nat.network)
            and self.book.successor(nat, heir, None) == self.book.me
        ):
            self._succeed(nat, heir)
        else:
            self._give_up(nat)

    def _prepare(self, nat: NatAddress, ap: ApId) -> None:
        """The address is offered to us: have its flows ready."""
        if nat in self.book.mine.ready:
            return
        if nat not in self._trials:
            self._trials[nat] = _Trial(_Step.FREE)
        if self._have_adopted(nat, ap):
            self.book.mine.ready.add(nat)
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
            trial.step = _Step.ADOPTING
            self._decisions.append(Decision(Want.ADOPT, nat, ap))
        return trial.step is _Step.ADOPTED

    def _take(self, nat: NatAddress) -> Hold:
        self.clock = max(self.clock, self.book.latest.get(nat, 0)) + 1
        hold = self.book.mine.holds[nat] = self._hold(nat, self.clock)
        self._taken[nat] = self._round
        self._untold[nat] = set(self.book.unheard)
        self._yielded.pop(nat, None)
        self.book.mine.ready.discard(nat)
        self.book.mine.left.discard(nat)
        self.book.mine.unconfirmed.discard(nat)
        self._trials.pop(nat, None)
        if self.book.homes() <= self.book.mine.holds.keys():
            self.book.mine.reclaims = False
        self._note("holds", f"holds {nat}")
        return hold

    def _note(self, state: str, what: str) -> None:
        self.notes.append(NoteAnchor(self.book.me, state, what))

    def _lose(self, nat: NatAddress, why: str) -> None:
        """Another AP holds the address, or is about to: what we translate to it ends here."""
        self._note("lets-go", f"lets go of {nat}: {why}")
        del self.book.mine.holds[nat]
        self.book.mine.unconfirmed.discard(nat)
        self._trials.pop(nat, None)
        self._decisions.append(Decision(Want.END, nat))

    def _give_up(self, nat: NatAddress) -> None:
        """We are not to take the address (any more): flows made ready for it end here."""
        trial = self._trials.pop(nat, None)
        adopted = trial is not None and trial.step in (_Step.ADOPTING, _Step.ADOPTED)
        if nat in self.book.mine.ready or adopted:
            self.book.mine.ready.discard(nat)
            self._decisions.append(Decision(Want.END, nat))

    def _hold(self, nat: NatAddress, generation: int) -> Hold:
        network = self.book.domain.network_by_name[nat.network]
        return Hold(nat, generation, successor=network.successor)

    def _wait(self) -> _Trial:
        """Try again later. A trial that has waited before keeps quiet about it."""
        return _Trial(_Step.WAITING, self._round + RETRY_ROUNDS)

    def _wanted_heir(
        self, nat: NatAddress, hold: Hold, unused: Collection[NatAddress]
    ) -> ApId | None:
        """Whom to offer an address of ours to; None: it stays."""
        if self.book.mode(nat.network) is not AnchorMode.ACTIVE:
            return self.book.successor(nat, self.book.me, hold.successor)
        home = self.book.home(nat)
        if home in (None, self.book.me) or not self.book.is_fit(home, nat.network):
            return None
        return home if nat in unused or self.book.statements[home].reclaims else None

    def _remind(self) -> None:
        """Whoever lost contact and comes back must learn whose its address is now."""
        if self._round % REMIND_ROUNDS == 0:
            for nat in self.book.foreign_holds():
                self._decisions.append(Decision(Want.DEFEND, nat))

    def _adopting(self) -> set[NatAddress]:
        steps = (_Step.ADOPTING, _Step.ADOPTED)
        return {nat for nat, trial in self._trials.items() if trial.step in steps}

    def _drop_trials(self, network: NetworkName) -> None:
        for nat in [nat for nat in self._trials if nat.network == network]:
            self._give_up(nat)
