"""Dead anchors, takeover, hand-over, drain: as dialogues of engines."""

from __future__ import annotations

import gc
from dataclasses import replace
from ipaddress import IPv4Address

import pytest

from apagent.core.anchor_book import AnchorBook
from apagent.core.anchors import RETRY_ROUNDS
from apagent.core.effects import (
    DefendAddress,
    Effect,
    EndFlows,
    Ending,
    LoosenFlows,
    NoteAnchor,
    PokeClients,
    ProbeAddress,
    Publish,
)
from apagent.core.engine import Engine
from apagent.core.events import (
    AddressConflict,
    AddressProbed,
    AdoptionFailed,
    ClientSeen,
    DrainRequested,
    Event,
    FlowsChanged,
    FlowsListed,
    PeerDelta,
    PeerDisconnected,
    ReclaimRequested,
    Source,
    SyncTimedOut,
)
from apagent.core.model import (
    AnchorMode,
    AnchorStatement,
    ApId,
    FlowKey,
    Hold,
    Mac,
    Nat,
    NatAddress,
    NetworkAnchor,
    stamped,
)
from tests.anchors_world import FOREIGN_MAC, World, home
from tests.domains import ANN, ANN_IP, AP1, AP2, AP3, LAN, domain, lan, tcp, udp

DEAD_ROUNDS = 3
PATIENCE = 20


def successor(world: World, of: ApId) -> ApId:
    """Who has the NAT address of an AP now."""
    (owner,) = world.owners(home(of))
    return owner


@pytest.mark.parametrize("user", [None, FOREIGN_MAC])
def test_an_agent_is_ready_when_it_has_its_address_or_cannot_have_it(user: Mac | None) -> None:
    network = replace(lan(), takeover=True, nat_address=home(AP1).address)
    engine = Engine(domain(AP1, 1, (network,)))
    engine.step(FlowsListed({}), 0.0)
    assert engine.in_sync
    assert not engine.is_ready
    engine.step(AddressProbed(home(AP1), user), 0.0)
    assert engine.is_ready


def test_every_ap_takes_its_own_address_after_asking_for_it() -> None:
    world = World()
    assert [world.owners(home(ap)) for ap in world.ids] == [[AP1], [AP2], [AP3]]
    assert [world.source(ap) for ap in world.ids] == [home(ap).address for ap in world.ids]
    assert world.seen(AP1, ProbeAddress) == [ProbeAddress(home(AP1))]


def test_a_dead_anchor_is_noticed_after_so_many_rounds_and_not_before() -> None:
    world = World(takeover=False)
    world.open(AP1, tcp(1))
    world.power_off(AP1)
    world.rounds(DEAD_ROUNDS - 1)
    assert world.way(AP2, tcp(1)) == AP1
    world.rounds(1)
    assert world.way(AP2, tcp(1)) == AP2


def test_an_agent_that_is_down_is_no_dead_anchor() -> None:
    world = World()
    world.open(AP1, tcp(1))
    world.give(AP2, PeerDisconnected(AP1, "its agent is down"))
    world.rounds(100)
    assert world.way(AP2, tcp(1)) == AP1
    assert world.owners(home(AP1)) == [AP1]


def test_a_successor_continues_the_flows_of_a_dead_anchor() -> None:
    world = World()
    world.open(AP1, tcp(1), udp(2))
    world.power_off(AP1)
    world.rounds(DEAD_ROUNDS)
    heir = successor(world, AP1)
    other = AP3 if heir == AP2 else AP2
    assert world.flows(heir) == {tcp(1), udp(2)}
    assert world.way(heir, tcp(1)) == heir
    assert world.way(other, tcp(1)) == world.way(other, udp(2)) == heir


def test_a_flow_that_the_others_did_not_know_goes_to_the_heir_of_its_anchor() -> None:
    world = World()
    world.open(AP1, tcp(1))
    world.power_off(AP1)
    world.rounds(DEAD_ROUNDS)
    heir = successor(world, AP1)
    other = AP3 if heir == AP2 else AP2
    assert world.installed[other].diverted == {AP1: heir}


@pytest.mark.parametrize("named", [AP2, AP3])
def test_a_named_successor_is_preferred(named: ApId) -> None:
    world = World(successor=named)
    world.power_off(AP1)
    world.rounds(DEAD_ROUNDS)
    assert successor(world, AP1) == named


def test_an_address_that_still_answers_is_left_alone() -> None:
    world = World()
    world.open(AP1, tcp(1))
    for other in (AP2, AP3):
        world.cut_control(AP1, other)
        world.unreachable.add(frozenset({AP1, other}))
    world.rounds(DEAD_ROUNDS + PATIENCE + 30)
    assert world.owners(home(AP1)) == [AP1]
    assert world.flows(AP1) == {tcp(1)}
    # They can't be reached there, nor continued here.
    assert world.way(AP2, tcp(1)) == AP2
    world.unreachable.clear()
    world.rounds(3)
    for other in (AP2, AP3):
        world.connect(AP1, other)
    assert world.way(AP2, tcp(1)) == AP1
    assert world.owners(home(AP1)) == [AP1]


def test_without_a_successor_flows_wait_no_longer_than_they_must() -> None:
    world = World()
    world.refuse_adoption = True
    world.open(AP1, tcp(1))
    world.power_off(AP1)
    world.rounds(DEAD_ROUNDS + PATIENCE - 2)
    assert world.way(AP2, tcp(1)) == AP1
    world.rounds(3)
    assert world.way(AP2, tcp(1)) == AP2
    world.refuse_adoption = False
    world.rounds(15)
    assert world.way(AP2, tcp(1)) == successor(world, AP1)


def test_flows_of_an_address_that_was_let_go_wait_until_its_heir_is_heard() -> None:
    """Holder and heir speak by feeds of their own: what the heir has said first may come last."""
    world = World()
    engine = world.engines[AP3]

    def says(*holds: Hold) -> None:
        down = (NetworkAnchor(LAN, AnchorMode.NO_UPLINK, home(AP1).address),)
        engine.step(PeerDelta(AP1, 9, anchor=AnchorStatement(down, holds)), 0.0)

    says(Hold(home(AP1), 1, offered_to=AP2))
    says()
    assert AP1 not in engine.anchoring.states[LAN].diverted
    ready = replace(engine.anchoring.book.statements[AP2], ready=frozenset({home(AP1)}))
    engine.step(PeerDelta(AP2, 9, anchor=ready), 0.0)
    assert home(AP1) not in engine.anchoring.book.addresses_of(AP1, LAN)


def test_a_peer_that_always_holds_other_addresses_costs_no_memory() -> None:
    engine = World().engines[AP1]
    said = engine.anchoring.book.statements[AP2]

    def addresses(first: int, last: int) -> int:
        """How many there are in memory when AP2 has held each of these for a moment."""
        for number in range(first, last):
            nat = NatAddress(LAN, IPv4Address("198.18.0.0") + number)
            statement = replace(said, holds=(*said.holds, Hold(nat, 1)))
            engine.step(PeerDelta(AP2, 1, anchor=statement), 0.0)
            engine.take_deltas()
        gc.collect()
        return sum(isinstance(found, NatAddress) for found in gc.get_objects())

    before = addresses(0, 300)
    assert addresses(300, 1300) < before + 300


def with_a_slow_successor() -> tuple[World, ApId, ApId]:
    """AP1 is long dead; who puts its flows into conntrack still, and who waits for that."""
    world = World()
    world.stall_adoption = True
    world.open(AP1, tcp(1))
    world.power_off(AP1)
    world.rounds(DEAD_ROUNDS + 2 * PATIENCE)
    [(heir, _)] = world.stalled
    [serving] = {AP2, AP3} - {heir}
    return world, heir, serving


def test_flows_wait_for_a_successor_that_has_begun_however_many_they_are() -> None:
    world, heir, serving = with_a_slow_successor()
    assert world.way(serving, tcp(1)) == world.way(heir, tcp(1)) == AP1
    for ap, adopted in world.stalled:
        world.give(ap, adopted)
    assert world.way(serving, tcp(1)) == world.way(heir, tcp(1)) == heir


def test_what_is_adopted_is_said_once_and_is_as_old_as_before() -> None:
    world, heir, _ = with_a_slow_successor()
    [(_, adopted)] = world.stalled
    [former] = adopted.sessions.values()
    reported = stamped(former, 0)
    assert reported != former
    world.effects[heir].clear()
    world.give(heir, FlowsChanged(LAN, {tcp(1): reported}))
    world.give(heir, adopted)
    said = [effect.tables[LAN] for effect in published(world.effects[heir]) if effect.tables]
    assert said == [{tcp(1): former}]


def test_what_conntrack_has_no_room_for_is_not_anchored() -> None:
    world, heir, _ = with_a_slow_successor()
    [(_, adopted)] = world.stalled
    world.give(heir, replace(adopted, left_out=frozenset({tcp(1)})))
    assert home(AP1).address in world.installed[heir].addresses
    assert world.flows(heir) == set()
    assert not world.engines[heir].anchoring.being_adopted(LAN)


class WithSlowProbes(World):
    """Who is asked for an address answers when the test says so."""

    def _carry_out(self, ap: ApId, effect: Effect) -> None:
        if not isinstance(effect, ProbeAddress):
            super()._carry_out(ap, effect)


def test_an_adoption_that_was_given_up_is_no_reason_to_take_an_address_unasked() -> None:
    world = WithSlowProbes()
    for ap in world.ids:
        world.give(ap, AddressProbed(home(ap), None))
    world.open(AP1, tcp(1))
    heir = world.engines[AP2].anchoring.book.successor(home(AP1), AP1, None)
    assert heir is not None
    tunnels = {frozenset({AP1, AP2}), frozenset({AP1, AP3})}
    world.stall_adoption = True
    world.unreachable |= tunnels
    world.rounds(DEAD_ROUNDS)
    world.give(heir, AddressProbed(home(AP1), None))
    [(_, adopted)] = world.stalled
    world.unreachable.clear()
    world.rounds(DEAD_ROUNDS)
    world.unreachable |= tunnels
    world.rounds(DEAD_ROUNDS)
    world.give(heir, adopted)
    assert world.owners(home(AP1)) == [AP1]
    world.give(heir, AddressProbed(home(AP1), FOREIGN_MAC))
    assert world.owners(home(AP1)) == [AP1]
    assert world.flows(heir) == set()


def test_an_heir_is_ready_when_it_has_what_was_opened_since_an_offer_that_was_withdrawn() -> None:
    world = World()
    world.stall_adoption = True
    world.open(AP1, tcp(1))
    world.give(AP1, DrainRequested(drain=True))
    world.give(AP1, DrainRequested(drain=False))
    world.open(AP1, tcp(2))
    world.give(AP1, DrainRequested(drain=True))
    [(heir, first), (_, second)] = world.stalled
    world.give(heir, first)
    assert world.owners(home(AP1)) == [AP1]
    world.give(heir, second)
    assert world.owners(home(AP1)) == [heir]
    assert world.flows(heir) == {tcp(1), tcp(2)}


def published(effects: list[Effect]) -> list[Publish]:
    return [effect for effect in effects if isinstance(effect, Publish)]


class WithMortalHeir(World):
    """The heir of what AP1 hands over dies when it is ready, before it hears that AP1 lets go."""

    def _carry_out(self, ap: ApId, effect: Effect) -> None:
        super()._carry_out(ap, effect)
        if isinstance(effect, Publish) and effect.anchor and home(AP1) in effect.anchor.ready:
            self._run_until_let_go()
            self.power_off(ap)

    def _run_until_let_go(self) -> None:
        while home(AP1) in self.engines[AP1].anchoring.book.mine.holds:
            self._run_one()


def test_flows_go_on_at_another_ap_if_their_heir_dies_before_it_has_their_address() -> None:
    world = WithMortalHeir()
    heir = world.engines[AP1].anchoring.book.successor(home(AP1), AP1, None)
    assert heir is not None
    [other] = {AP2, AP3} - {heir}
    world.open(AP1, tcp(1))
    world.give(AP1, DrainRequested(drain=True))
    assert world.dead == {heir}
    assert world.owners(home(AP1)) == []
    world.rounds(DEAD_ROUNDS + 2)
    assert world.owners(home(AP1)) == [other]
    assert world.flows(other) == {tcp(1)}
    assert world.way(AP1, tcp(1)) == other
    states = [note.state for note in world.effects[other] if isinstance(note, NoteAnchor)]
    assert "forsaken" not in states


def test_flows_do_not_wait_for_a_successor_that_is_gone_itself() -> None:
    world, heir, serving = with_a_slow_successor()
    world.power_off(heir)
    world.rounds(5)
    assert world.stalled[-1][0] == serving
    world.refuse_adoption = True
    world.give(serving, AdoptionFailed(home(AP1), "no room"))
    assert world.way(serving, tcp(1)) == AP1
    world.rounds(PATIENCE)
    assert world.way(serving, tcp(1)) == serving


def test_an_agent_that_has_not_heard_of_a_dead_anchor_waits_for_its_successor_too() -> None:
    world, heir, serving = with_a_slow_successor()
    world.restart(serving)
    world.rounds(2 * PATIENCE)
    assert world.way(serving, tcp(1)) == AP1
    for ap, adopted in world.stalled:
        world.give(ap, adopted)
    assert world.way(serving, tcp(1)) == heir


def test_flows_are_given_up_once_though_their_successor_goes_on_trying() -> None:
    world = World()
    world.open(AP1, tcp(1))
    world.refuse_adoption = True
    world.power_off(AP1)
    world.rounds(DEAD_ROUNDS + 3 * PATIENCE)
    for ap in (AP2, AP3):
        states = [note.state for note in world.effects[ap] if isinstance(note, NoteAnchor)]
        assert states.count("forsaken") == 1
        assert world.way(ap, tcp(1)) == ap
    world.refuse_adoption = False
    world.rounds(RETRY_ROUNDS)
    assert world.way(AP2, tcp(1)) == world.way(AP3, tcp(1)) == successor(world, AP1)


def test_flows_of_an_anchor_that_a_restarted_agent_has_not_heard_wait_as_well() -> None:
    world = World()
    world.open(AP1, tcp(1))
    world.cut_control(AP1, AP2)
    world.restart(AP2)
    world.give(AP2, SyncTimedOut())
    world.unreachable.add(frozenset({AP1, AP2}))
    world.rounds(DEAD_ROUNDS + PATIENCE - 2)
    assert world.way(AP2, tcp(1)) == AP1
    world.rounds(3)
    assert world.way(AP2, tcp(1)) == AP2


def test_clients_that_only_listen_are_roused_when_their_anchor_is_given_up() -> None:
    world = World(takeover=False)
    world.give(AP2, ClientSeen(LAN, ANN, Source.FDB, ANN_IP))
    world.open(AP1, tcp(1), udp(2))
    world.power_off(AP1)
    world.rounds(DEAD_ROUNDS)
    assert world.seen(AP2, PokeClients) == [PokeClients(LAN, {ANN: (tcp(1),)})]
    assert world.seen(AP3, PokeClients) == []


def test_a_udp_flow_of_a_dead_anchor_is_anchored_anew_and_stays() -> None:
    world = World(takeover=False)
    world.open(AP1, udp(1))
    world.power_off(AP1)
    world.rounds(DEAD_ROUNDS)
    world.open(AP2, udp(1))
    assert world.flows(AP2) == {udp(1)}
    assert world.way(AP3, udp(1)) == AP2


def test_a_rebooted_anchor_does_not_steal_its_address_back() -> None:
    world = World()
    world.open(AP1, tcp(1))
    world.power_off(AP1)
    world.rounds(DEAD_ROUNDS)
    heir = successor(world, AP1)
    world.boot(AP1)
    world.rounds(40)
    assert successor(world, AP1) == heir
    assert world.way(AP1, tcp(1)) == heir
    # Its new flows are translated to the uplink's own address meanwhile.
    assert world.source(AP1) != home(AP1).address
    world.open(AP1, tcp(2))
    assert world.flows(AP1) == {tcp(2)}
    # The last flow that needs the address ends: it goes home.
    world.close(heir, tcp(1))
    world.rounds(15)
    assert successor(world, AP1) == AP1
    assert world.source(AP1) == home(AP1).address


def test_an_address_comes_home_on_command_with_its_flows() -> None:
    world = World()
    world.open(AP1, tcp(1))
    world.power_off(AP1)
    world.rounds(DEAD_ROUNDS)
    heir = successor(world, AP1)
    world.boot(AP1)
    world.rounds(5)
    world.give(AP1, ReclaimRequested())
    assert successor(world, AP1) == AP1
    assert world.flows(AP1) == {tcp(1)}
    assert world.flows(heir) == set()
    assert world.way(heir, tcp(1)) == AP1


def test_a_command_that_found_nothing_to_bring_home_is_done() -> None:
    world = World()
    world.open(AP1, tcp(1))
    world.give(AP1, ReclaimRequested())
    world.give(AP1, DrainRequested(drain=True))
    world.give(AP1, DrainRequested(drain=False))
    assert world.owners(home(AP1)) != [AP1]
    assert world.way(AP2, tcp(1)) != AP1


def test_a_drain_moves_all_flows_and_new_ones_open_elsewhere() -> None:
    world = World()
    world.open(AP1, tcp(1), udp(2))
    world.give(AP1, DrainRequested(drain=True))
    heir = successor(world, AP1)
    assert heir != AP1
    assert LoosenFlows((tcp(1),)) in world.effects[AP1]
    assert world.flows(AP1) == set()
    assert world.flows(heir) == {tcp(1), udp(2)}
    assert world.way(AP1, tcp(1)) == heir
    assert world.way(AP1, tcp(9)) in (AP2, AP3)
    world.give(AP1, DrainRequested(drain=False))
    assert world.way(AP1, tcp(9)) == AP1
    assert world.way(AP1, tcp(1)) == heir


def test_a_drain_without_takeover_waits_for_the_flows_to_end() -> None:
    world = World(takeover=False)
    world.open(AP1, tcp(1), udp(2))
    world.give(AP1, DrainRequested(drain=True))
    assert world.flows(AP1) == {tcp(1), udp(2)}
    assert world.way(AP1, tcp(1)) == AP1
    assert world.way(AP1, tcp(9)) in (AP2, AP3)
    world.close(AP1, tcp(1), udp(2))
    assert world.flows(AP1) == set()


def test_at_no_moment_of_a_drain_is_a_flow_without_an_anchor_that_knows_it() -> None:
    world = World()
    world.open(AP1, tcp(1))
    install = world._install

    def check(ap: ApId) -> None:
        install(ap)
        for serving in world.ids:
            anchor = world.way(serving, tcp(1))
            assert tcp(1) in world.flows(anchor) or anchor == AP1
        assert len(world.owners(home(AP1))) <= 1

    world._install = check  # type: ignore[method-assign]
    world.give(AP1, DrainRequested(drain=True))
    assert world.flows(AP1) == set()


def test_a_dead_uplink_moves_its_flows_like_a_drain() -> None:
    world = World()
    world.open(AP1, tcp(1))
    world.down[AP1] = "no carrier"
    world.rounds(10)
    heir = successor(world, AP1)
    assert heir != AP1
    assert world.flows(heir) == {tcp(1)}
    assert world.way(AP1, tcp(1)) == heir
    assert world.way(AP1, tcp(9)) in (AP2, AP3)


def test_flows_behind_a_dead_uplink_fail_fast_without_takeover() -> None:
    world = World(takeover=False)
    world.open(AP1, tcp(1))
    world.down[AP1] = "no carrier"
    world.rounds(10)
    assert world.flows(AP1) == set()
    assert EndFlows(LAN, (tcp(1),), Ending.FORSAKEN) in world.effects[AP1]
    assert world.way(AP1, tcp(9)) in (AP2, AP3)
    world.down.clear()
    world.rounds(12)
    assert world.way(AP1, tcp(9)) == AP1


def test_an_uplink_that_flaps_changes_nothing() -> None:
    world = World()
    world.open(AP1, tcp(1))
    for _ in range(5):
        world.down[AP1] = "no carrier"
        world.rounds(3)
        world.down.clear()
        world.rounds(3)
    assert world.owners(home(AP1)) == [AP1]
    assert world.flows(AP1) == {tcp(1)}


def test_whoever_was_cut_off_yields_when_it_hears_of_its_successor() -> None:
    world = World()
    world.open(AP1, tcp(1))
    world.down[AP1] = "unplugged"  # its switch has lost power: uplink and backhaul
    for other in (AP2, AP3):
        world.cut_control(AP1, other)
        world.unreachable.add(frozenset({AP1, other}))
    world.rounds(DEAD_ROUNDS + 5)
    heir = successor(world, AP1)
    assert heir != AP1
    world.unreachable.clear()
    world.down.clear()
    world.rounds(20)
    # It finds the address in use, though it hears nobody yet.
    assert world.owners(home(AP1)) == [heir]
    for other in (AP2, AP3):
        world.connect(AP1, other)
    assert world.owners(home(AP1)) == [heir]
    assert world.way(AP1, tcp(1)) == heir
    assert world.flows(AP1) == set()


def test_a_home_yields_to_a_stranger_only_if_it_does_not_hear_everybody() -> None:
    world = World()
    world.give(AP1, AddressConflict(home(AP1), FOREIGN_MAC))
    assert world.owners(home(AP1)) == [AP1]
    assert world.seen(AP1, DefendAddress) == [DefendAddress(home(AP1))]
    world.cut_control(AP1, AP2)
    world.give(AP1, AddressConflict(home(AP1), FOREIGN_MAC))
    assert world.owners(home(AP1)) == []
    world.connect(AP1, AP2)
    world.rounds(15)
    assert world.owners(home(AP1)) == [AP1]


def test_what_was_said_before_an_address_was_taken_is_no_reason_to_yield_it() -> None:
    world = World()
    world.give(AP1, DrainRequested(drain=True))
    former = successor(world, AP1)
    [dead] = {AP2, AP3} - {former}
    world.power_off(dead)
    world.give(AP1, DrainRequested(drain=False))
    world.give(AP1, ReclaimRequested())
    assert world.owners(home(AP1)) == [AP1]
    world.give(AP1, AddressConflict(home(AP1), FOREIGN_MAC))
    assert world.owners(home(AP1)) == [AP1]
    world.rounds(3)
    world.give(AP1, AddressConflict(home(AP1), FOREIGN_MAC))
    assert world.owners(home(AP1)) == []


def test_who_loses_uplink_and_peers_at_once_takes_nothing() -> None:
    """It counts them as dead before it counts its own uplink as dead, and nobody can answer it."""
    world = World()
    world.down[AP1] = "no carrier"
    for other in (AP2, AP3):
        world.cut_control(AP1, other)
        world.unreachable.add(frozenset({AP1, other}))
    for _ in range(DEAD_ROUNDS + 5):
        world.rounds(1)
        assert world.owners(home(AP2)) == [AP2]
        assert world.owners(home(AP3)) == [AP3]


def test_two_that_defend_themselves_do_not_flood_the_segment() -> None:
    world = World()
    for _ in range(5):
        world.give(AP1, AddressConflict(home(AP1), FOREIGN_MAC))
    assert len(world.seen(AP1, DefendAddress)) == 1
    world.rounds(15)
    world.give(AP1, AddressConflict(home(AP1), FOREIGN_MAC))
    assert len(world.seen(AP1, DefendAddress)) == 2


def test_a_restarted_agent_keeps_the_address_that_it_finds_and_its_flows() -> None:
    world = World()
    world.open(AP1, tcp(1))
    world.restart(AP1)
    assert world.owners(home(AP1)) == [AP1]
    assert world.flows(AP1) == {tcp(1)}
    assert world.way(AP2, tcp(1)) == AP1
    assert world.seen(AP1, ProbeAddress) == [ProbeAddress(home(AP1))]
    assert world.seen(AP1, DefendAddress) == [DefendAddress(home(AP1))]  # perhaps nobody knows


def test_a_restarted_heir_keeps_the_address_of_another_one() -> None:
    world = World(successor=AP2)
    world.open(AP1, tcp(1))
    world.power_off(AP1)
    world.rounds(DEAD_ROUNDS)
    world.restart(AP2)
    world.rounds(PATIENCE)
    assert world.owners(home(AP1)) == [AP2]
    assert world.way(AP3, tcp(1)) == AP2


def test_an_agent_that_was_restarted_while_it_was_succeeded_yields() -> None:
    world = World(successor=AP2)
    world.open(AP1, tcp(1))
    world.down[AP1] = "unplugged"
    for other in (AP2, AP3):
        world.cut_control(AP1, other)
        world.unreachable.add(frozenset({AP1, other}))
    world.rounds(3)
    left = world.engines[AP1].wanted()[LAN]
    world.rounds(DEAD_ROUNDS)
    world.installed[AP1] = left
    assert left.addresses
    world.down.clear()
    world.unreachable.clear()
    world.unheard.clear()
    world.restart(AP1)
    assert world.owners(home(AP1)) == [AP2]
    assert world.way(AP1, tcp(1)) == AP2


def test_what_happens_is_told() -> None:
    world = World()
    world.power_off(AP1)
    world.rounds(DEAD_ROUNDS)
    heir = successor(world, AP1)
    notes = [n for n in world.effects[heir] if isinstance(n, NoteAnchor)]
    assert [n.state for n in notes][-2:] == ["dead", "holds"]


def test_an_address_taken_before_the_peers_were_heard_is_taken_again_when_they_are() -> None:
    world = World()
    others = [AP1, AP2]
    for ap in world.ids:
        # The clock goes on while everybody is well, and AP3 takes its address again.
        world.give(ap, ClientSeen(LAN, ANN, Source.FDB))
    world.restart(AP3)
    held = world.engines[AP1].anchoring.book.latest[home(AP3)]
    assert held > 3
    for other in others:
        world.cut_control(AP3, other)
    world.restart(AP3)
    world.give(AP3, SyncTimedOut())
    for other in others:
        world.connect(AP3, other)
    for ap in world.ids:
        assert world.engines[ap].anchoring.book.holder(home(AP3)) == AP3


def test_flows_made_ready_by_an_earlier_run_end_if_the_address_is_anothers() -> None:
    world = World()
    world.open(AP2, tcp(1), at=home(AP1).address)
    world.restart(AP2)
    assert world.flows(AP2) == set()


@pytest.mark.parametrize("how", [FlowsChanged(LAN, {tcp(1): None}), FlowsListed({LAN: {}})])
def test_a_flow_that_ends_while_it_is_adopted_is_not_anchored(
    how: Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(successor=AP2)
    adopt = world._adopt

    def end_first(ap: ApId, nat: NatAddress, sessions: dict[FlowKey, Nat]) -> None:
        world._put(ap, how)
        adopt(ap, nat, sessions)

    monkeypatch.setattr(world, "_adopt", end_first)
    world.open(AP1, tcp(1))
    world.power_off(AP1)
    world.rounds(DEAD_ROUNDS)
    assert successor(world, AP1) == AP2
    assert world.flows(AP2) == set()


def test_a_hold_that_its_holder_states_lower_than_before_counts() -> None:
    book = AnchorBook(domain(AP1))
    nat = home(AP2)
    book.hear(AP2, AnchorStatement(holds=(Hold(nat, 9),)))
    assert book.holder(nat) == AP2
    book.hear(AP2, AnchorStatement(holds=(Hold(nat, 4),)))
    assert book.holder(nat) == AP2


def test_a_hold_that_was_superseded_stays_void_until_its_ap_says_another() -> None:
    book = AnchorBook(domain(AP1))
    nat = home(AP2)
    book.hear(AP2, AnchorStatement(holds=(Hold(nat, 4),)))
    book.hear(AP3, AnchorStatement(holds=(Hold(nat, 5),)))
    assert book.holder(nat) == AP3
    book.hear(AP3, AnchorStatement(holds=(Hold(nat, 0),)))
    assert book.holder(nat) == AP3
    book.hear(AP3, AnchorStatement())
    assert book.holder(nat) is None
    book.hear(AP2, AnchorStatement(holds=(Hold(nat, 6),)))
    assert book.holder(nat) == AP2


@pytest.mark.parametrize("first", [AP1, AP2, AP3])
def test_the_flows_of_each_address_of_a_dead_anchor_wait_for_their_own_successor(
    first: ApId,
) -> None:
    world = World(aps=6)
    world.open(first, tcp(1))
    world.power_off(first)
    world.rounds(DEAD_ROUNDS)
    heir = successor(world, first)
    world.open(heir, tcp(2))
    install = world._install

    def check(ap: ApId) -> None:
        install(ap)
        for serving in set(world.ids) - world.dead:
            for flow in (tcp(1), tcp(2)):
                anchor = world.way(serving, flow)
                assert anchor == heir or flow in world.flows(anchor)

    world._install = check  # type: ignore[method-assign]
    world.power_off(heir)
    world.rounds(DEAD_ROUNDS)
    assert heir not in {successor(world, first), successor(world, heir)}
