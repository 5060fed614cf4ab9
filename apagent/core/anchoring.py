"""Anchors at work in the engine: what happens goes in, effects and the kernel's share come out.

`Anchors` decides on statements and addresses alone. Here its decisions meet the session tables:
which flows an address stands for, which clients to rouse, and whose flow a flow is now.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace
from functools import singledispatchmethod
from ipaddress import IPv4Address

from apagent.core.anchors import REMIND_ROUNDS, Anchors, Decision, Want
from apagent.core.clients import ClientTable
from apagent.core.desired import NOBODY, AnchorState
from apagent.core.domain import Domain
from apagent.core.effects import (
    AdoptFlows,
    DefendAddress,
    Effect,
    EndFlows,
    Ending,
    LoosenFlows,
    NoteAnchor,
    PokeClients,
    ProbeAddress,
)
from apagent.core.events import (
    AddressConflict,
    AddressProbed,
    AdoptionFailed,
    AnchorEvent,
    DrainRequested,
    FlowsAdopted,
    ProbesAnswered,
    ReclaimRequested,
)
from apagent.core.forwards import Forwards, MovingForwards, standing_sessions
from apagent.core.latecomers import Latecomers
from apagent.core.liveness import Liveness, Uplinks
from apagent.core.model import (
    NAT_ADDRESS,
    PROTOCOL_OFFSET,
    TCP,
    TRANSLATION,
    AnchorStatement,
    ApId,
    FlowKey,
    Mac,
    Nat,
    NatAddress,
    NetworkName,
    SessionChanges,
    Sessions,
    client_of,
    is_standing,
)
from apagent.core.session_tables import SessionTables


class Anchoring:
    """The anchors of a domain, as far as they touch its sessions."""

    def __init__(
        self,
        domain: Domain,
        sessions: Mapping[NetworkName, SessionTables],
        clients: Mapping[NetworkName, ClientTable],
    ) -> None:
        self._me = domain.me.id
        self._sessions = sessions
        self._clients = clients
        self.anchors = Anchors(domain)
        self.book = self.anchors.book
        """What all APs say of themselves as anchors."""
        self._forwards = {
            n.name: MovingForwards(n) for n in domain.networks if n.lets_forwards_move
        }
        self.standing = {
            n.name: standing_sessions({} if n.takeover else n.forwarded) for n in domain.networks
        }
        """The standing sessions that we say, by network."""
        self._said: dict[NetworkName, SessionChanges] = {}
        self._peers = set(domain.peer_by_id)
        self.liveness = Liveness(self._peers, domain.dead_after_rounds)
        self._uplinks = Uplinks(sessions)
        self._rounds = 0
        self._unused: frozenset[NatAddress] = frozenset()
        self._forsaken: set[tuple[ApId, NetworkName]] = set()
        self._unwanted: dict[NetworkName, set[FlowKey]] = {name: set() for name in sessions}
        """Flows that were adopted although the address was given up meanwhile: they end again."""
        self._adopting: dict[NatAddress, dict[FlowKey, Nat]] = {}
        """Flows that are being put into our conntrack table and that haven't ended there since."""
        self._latecomers = Latecomers(sessions)
        self._stated = AnchorStatement()
        self._due = True
        self.states = dict.fromkeys(sessions, AnchorState())
        """What the kernel should hold of it, by network."""
        self._installed = dict(self.states)

    def is_moving(self, network: NetworkName) -> bool:
        """Whether an address has left us of which not all can know where it is.

        Its heir hasn't said yet that it has taken it, or a peer whose kernel is alive has no agent
        that hears us.
        """
        moving = any(
            self.book.hold_of(nat) is None and self.book.holder(nat) not in (None, self._me)
            for nat in self.book.known()
            if nat.network == network
        )
        return moving or bool(self.book.unheard - self.book.dead)

    # --- in

    @singledispatchmethod
    def take(self, event: AnchorEvent) -> None:
        """Take an event in; `settle` says what follows."""
        raise TypeError(f"not an event of anchors: {event!r}")

    @take.register
    def _(self, event: ProbesAnswered) -> None:
        self._rounds += 1
        changed = self.liveness.take(event.answered, self._peers - self.book.unheard)
        for peer in sorted(changed):
            self._note_liveness(peer)
        self.book.dead = self.liveness.dead
        self.anchors.deaf = {network for network, trouble in event.uplinks.items() if trouble}
        for network, trouble in self._uplinks.take(event.uplinks).items():
            self.anchors.uplink_changed(network, trouble)
            changed.add(self._me)
        if self.anchors.pass_round() or changed:
            self._due = True
        if self._rounds % REMIND_ROUNDS == 0:
            self._unused = self._find_unused()

    @take.register
    def _(self, event: AddressProbed) -> None:
        self.anchors.probed(event.nat, event.used_by)
        self._due = True

    @take.register
    def _(self, event: AddressConflict) -> None:
        self.anchors.conflict(event.nat, event.mac)
        self._due = True

    @take.register
    def _(self, event: FlowsAdopted) -> None:
        # It may be the answer to a former question: others may have been opened since.
        if self._adopting.get(event.nat, {}).keys() <= event.sessions.keys():
            self.anchors.adopted(event.nat)
        if not self.anchors.is_wanted(event.nat):
            self._adopting[event.nat] = {}
            self._unwanted[event.nat.network] |= event.sessions.keys()
        self._due = True

    @take.register
    def _(self, event: AdoptionFailed) -> None:
        self._adopting.pop(event.nat, None)
        self.anchors.adoption_failed(event.nat, event.reason)
        self._due = True

    @take.register
    def _(self, event: DrainRequested) -> None:
        self.anchors.drain(drain=event.drain)
        self._due = True

    @take.register
    def _(self, _event: ReclaimRequested) -> None:
        self.anchors.reclaim()
        self._due = True

    def adopted(self, event: FlowsAdopted) -> Sessions:
        """The flows that we anchor by this, and that conntrack hasn't reported or ended yet."""
        going = self._adopting.get(event.nat, {})
        own = self._sessions[event.nat.network].table(self._me)
        found = {
            key: nat
            for key, nat in event.sessions.items()
            if key in going
            and key not in event.left_out
            and (key not in own or own[key][TRANSLATION] != nat[TRANSLATION])
        }
        for key in going.keys() & event.sessions.keys():
            del going[key]
        if not going:
            self._adopting.pop(event.nat, None)
        return found

    def being_adopted(self, network: NetworkName) -> dict[bytes, Sessions]:
        """The flows that are being adopted, by NAT address (4 bytes)."""
        return {
            nat.address.packed: going
            for nat, going in self._adopting.items()
            if nat.network == network
        }

    def heard(self, network: NetworkName, changes: SessionChanges) -> None:
        """Note what a peer says of its flows: some may belong to an address of ours."""
        if self._latecomers.hear(network, changes):
            self._due = True

    def flows_changed(self, network: NetworkName, changes: SessionChanges) -> None:
        """Note what conntrack reports while flows are being adopted."""
        for nat, going in self._adopting.items():
            if nat.network == network:
                for key in going.keys() & changes.keys():
                    if changes[key] is None:
                        del going[key]

    def flows_listed(self, network: NetworkName, listed: Container[FlowKey]) -> None:
        """The same for the whole table. What it lacks may be adopted yet: that is reported then."""
        for nat, going in self._adopting.items():
            if nat.network == network:
                for key in [key for key in going if key not in listed]:
                    del going[key]

    def hear(self, peer: ApId, statement: AnchorStatement | None) -> None:
        """A peer's feed is in sync, and says this of it (None: nothing)."""
        if statement is None:
            self.book.statements.pop(peer, None)
        else:
            self.book.hear(peer, statement)
        self._due = True

    def hears(self, peer: ApId, *, hears: bool) -> None:
        """Note whether a peer's feed is in sync."""
        if hears == (peer in self.book.unheard):
            (self.book.unheard.discard if hears else self.book.unheard.add)(peer)
            self._due = True

    def adopt(
        self, network: NetworkName, addresses: frozenset[IPv4Address], forwards: Forwards
    ) -> None:
        """Addresses that an earlier run of ours left on the uplink, and port forwards."""
        self.anchors.adopt(network, addresses)
        if network in self._forwards:
            self._forwards[network].adopt(forwards)
        self._due = True

    def reach_sync(self) -> None:
        """We are in sync: from now on addresses may be taken."""
        self.book.mine.left = self._find_left()
        self._due = True

    # --- out

    def settle(self, clock: int, *, in_sync: bool) -> list[Effect]:
        """What follows from all that was taken in; `clock` is the domain's."""
        self.anchors.clock = max(self.anchors.clock, clock)
        if not self._due:
            return []
        self._due = False
        decisions = self.anchors.settle(self._unused, in_sync=in_sync)
        effects = [effect for d in decisions for effect in self._effects_of(d)]
        for name, tables in self._sessions.items():
            if self._unwanted[name]:
                unwanted = tuple(sorted(self._unwanted[name]))
                effects.append(EndFlows(name, unwanted, Ending.MOVED))
                self._unwanted[name].clear()
            effects += self._forsake(name)
            tables.judge_by(self.anchors.rules(name))
            self.states[name] = self.anchors.state(name)
            if name in self._forwards:
                self._settle_forwards(name, self._forwards[name], in_sync=in_sync)
        effects += self._adopt_latecomers(in_sync=in_sync)
        notes, self.anchors.notes = self.anchors.notes, []
        return [*effects, *notes]

    def take_standing(self) -> dict[NetworkName, SessionChanges]:
        """What has changed since the last call of the standing sessions that we say."""
        said, self._said = self._said, {}
        return said

    def statement_if_changed(self) -> AnchorStatement | None:
        """What our feed should say of us as an anchor; None: it says so already."""
        statement = self.book.statement()
        if statement == self._stated:
            return None
        self._stated = statement
        return statement

    def drain_states(self, network: NetworkName) -> tuple[AnchorState, AnchorState]:
        """The kernel's share at the last call, and now."""
        before, after = self._installed[network], self.states[network]
        self._installed[network] = after
        return before, after

    def own_left(self, network: NetworkName) -> int:
        """The flows that a drained AP still anchors."""
        table = self._sessions[network].table(self._me)
        return len(table) - len(self.standing[network].keys() & table.keys())

    def is_forsaken(self, network: NetworkName) -> bool:
        """Whether our own flows are given up, since our uplink is dead."""
        return (self._me, network) in self._forsaken

    def unwanted_addresses(self, network: NetworkName) -> set[bytes]:
        """The NAT addresses (4 bytes) that move between APs and that are not ours now or soon."""
        return {
            nat.address.packed
            for nat in self.book.known() | self.book.peers_homes()
            if nat.network == network and not self.anchors.is_wanted(nat)
        }

    # --- decisions and sessions

    def _effects_of(self, decision: Decision) -> list[Effect]:
        nat = decision.nat
        match decision.want:
            case Want.PROBE:
                return [ProbeAddress(nat)]
            case Want.DEFEND:
                return [DefendAddress(nat)]
            case Want.ADOPT:
                if nat.network in self._forwards:
                    table = self._sessions[nat.network].table(decision.ap)
                    self._forwards[nat.network].learn(nat.address, table)
                self._adopting.pop(nat, None)
                return [self._adopt_flows(nat, self._translated_to(nat, decision.ap))]
            case Want.LOOSEN:
                own = self._translated_to(nat, self._me)
                flows = tuple(key for key in own if key[PROTOCOL_OFFSET] == TCP)
                return [LoosenFlows(flows)] if flows else []
            case Want.END:
                also = {} if decision.ap == NOBODY else self._translated_to(nat, decision.ap)
                flows = tuple(key for key in self._translated_to(nat, self._me) if key not in also)
                return [EndFlows(nat.network, flows, Ending.MOVED)] if flows else []

    def _adopt_flows(self, nat: NatAddress, flows: Sessions) -> AdoptFlows:
        self._adopting.setdefault(nat, {}).update(flows)
        forwards = self._forwards.get(nat.network)
        return AdoptFlows(
            nat, flows, forwards.let_in(nat.address, flows) if forwards else frozenset()
        )

    def _adopt_latecomers(self, *, in_sync: bool) -> list[Effect]:
        """Go on also with those flows that were opened when we had taken over the others.

        Before we are in sync, what we seem to hold may be another's by now.
        """
        for name in self._sessions:
            self._latecomers.watch(name, self.anchors.held(name) | self.anchors.coming(name))
        effects: list[Effect] = []
        for nat in self._latecomers.waiting():
            if not in_sync or nat.address in self.anchors.coming(nat.network):
                continue
            own = self._sessions[nat.network].table(self._me)
            late = self._latecomers.take(nat).items()
            if flows := {key: made for key, made in late if key not in own}:
                effects.append(self._adopt_flows(nat, flows))
        return effects

    def _translated_to(self, nat: NatAddress, ap: ApId) -> Sessions:
        address = nat.address.packed
        table = self._sessions[nat.network].table(ap)
        return {
            key: made
            for key, made in table.items()
            if made[NAT_ADDRESS] == address and not is_standing(key)
        }

    def _settle_forwards(
        self, name: NetworkName, forwards: MovingForwards, *, in_sync: bool
    ) -> None:
        """Who holds an address, or is about to, says its forwards.

        They are in our kernel before anything else of an address that is coming: whoever dies on
        the way finds them there. What we find so is believed until we are in sync, unless we hear
        that another has the address.
        """
        engaged = self.anchors.held(name) | self.anchors.left(name)
        if not in_sync:
            holders = {a: self.book.holder(NatAddress(name, a)) for a in forwards.adopted}
            engaged |= {a for a, holder in holders.items() if holder in (None, self._me)}
        installed = engaged | self.anchors.coming(name)
        forwards.forget_others(installed)
        self.states[name] = replace(self.states[name], forwards=forwards.of(installed))
        before, after = self.standing[name], standing_sessions(forwards.of(engaged))
        if before != after:
            self.standing[name] = after
            gone = (key for key in before if key not in after)
            self._said[name] = {**dict.fromkeys(gone), **after}

    def _find_left(self) -> set[NatAddress]:
        """The peers' addresses that nobody holds, and that an earlier run of ours had made ready.

        Flows of ours are translated to them, or we have their port forwards.
        """
        foreign = {nat for nat in self.book.peers_homes() if self.book.holder(nat) is None}
        forwarding = {
            NatAddress(name, address)
            for name, forwards in self._forwards.items()
            for address in forwards.foreign()
        }
        return {nat for nat in foreign if nat in forwarding or self._translates_to(nat)}

    def _find_unused(self) -> frozenset[NatAddress]:
        """The addresses of others that we hold and that no flow of ours needs any more."""
        foreign = [nat for nat in self.book.holds_of(self._me) if not self.book.is_home(nat)]
        return frozenset(nat for nat in foreign if not self._translates_to(nat))

    def _translates_to(self, nat: NatAddress) -> bool:
        """Whether a flow of ours is translated to the address."""
        return any(
            made[NAT_ADDRESS] == nat.address.packed and not is_standing(key)
            for key, made in self._sessions[nat.network].table(self._me).items()
        )

    def _forsake(self, network: NetworkName) -> list[Effect]:
        """Anchors whose flows are given up now: rouse their clients, or end our own flows."""
        effects: list[Effect] = []
        for ap, table in self._sessions[network].all():
            forsaken = self.anchors.dead_anchors.is_forsaken(ap, network)
            if forsaken == ((ap, network) in self._forsaken):
                continue
            self._forsaken ^= {(ap, network)}
            if not forsaken:
                continue
            if ap == self._me:
                flows = tuple(key for key in table if not is_standing(key))
                effects += [EndFlows(network, flows, Ending.FORSAKEN)] if flows else []
            elif clients := self._silent(network, table):
                effects.append(PokeClients(network, clients))
            effects.append(
                NoteAnchor(ap, "forsaken", f"its {len(table)} flows in {network} end: no successor")
            )
        return effects

    def _silent(self, network: NetworkName, table: Sessions) -> dict[Mac, tuple[FlowKey, ...]]:
        """TCP flows of clients that we serve: such a client may only be listening."""
        here = {
            address.packed: client.claim.mac
            for client in self._clients[network]
            if client.claim.ap == self._me
            for address in client.claim.addresses
        }
        flows: dict[Mac, list[FlowKey]] = {}
        for key in table:
            mac = here.get(client_of(key))
            if mac is not None and key[PROTOCOL_OFFSET] == TCP and not is_standing(key):
                flows.setdefault(mac, []).append(key)
        return {mac: tuple(keys) for mac, keys in flows.items()}

    def _note_liveness(self, peer: ApId) -> None:
        if peer in self.liveness.dead:
            note = NoteAnchor(peer, "dead", "doesn't answer through the tunnel")
        else:
            note = NoteAnchor(peer, "alive", "answers through the tunnel again")
        self.anchors.notes.append(note)
