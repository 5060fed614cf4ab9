"""Port forwards that go with their NAT address: as dialogues of engines."""

from __future__ import annotations

from dataclasses import replace

import pytest

from apagent.core.domain import Forward
from apagent.core.effects import AdoptFlows
from apagent.core.engine import Engine
from apagent.core.events import (
    ClientAged,
    ClientSeen,
    DrainRequested,
    FlowsChanged,
    FlowsListed,
    ReclaimRequested,
    Source,
)
from apagent.core.model import TCP, UDP, ApId, Flow, FlowKey, Nat, SocketKey
from tests.anchors_world import World, home
from tests.domains import ANN, ANN_IP, AP1, AP2, AP3, BEN_IP, LAN, domain, takeover, tcp

WEB, PHONE = Forward(TCP, 8080, ANN_IP, 80), Forward(UDP, 5060, ANN_IP, 5061)
AT_AP1 = {AP1: (WEB, PHONE)}
DEAD_ROUNDS = 3
UNUSED_ROUNDS = 25
"""An address that no flow needs goes home by then."""


def as_forwarded(of: ApId, *forwards: Forward) -> dict[SocketKey, SocketKey]:
    """What an AP's forwards are, seen from outside."""
    return {f.outside(home(of).address): f.inside for f in forwards}


ALL = as_forwarded(AP1, WEB, PHONE)


def called(forward: Forward = WEB, port: int = 50000) -> FlowKey:
    """A flow that somebody outside has opened to a forwarded port."""
    remote = Flow.of(tcp(1)).remote
    return Flow(forward.protocol, forward.client, forward.client_port, remote, port).key


def in_force(world: World, at: ApId, forwards: dict[SocketKey, SocketKey]) -> bool:
    """Whether an AP has these forwards and says so, and nobody else does."""
    said = {ap: said for ap in world.ids if ap not in world.dead and (said := world.said(ap))}
    assert world.lead_in() == {at: forwards}
    assert said == {at: forwards}
    return True


def owner(world: World, of: ApId = AP1) -> ApId:
    (found,) = world.owners(home(of))
    return found


def world_of(**settings: object) -> World:
    """ap2 succeeds ap1."""
    return World(**{"successor": AP2, "forwards": AT_AP1, **settings})  # type: ignore[arg-type]


def test_whoever_has_the_address_has_its_forwards() -> None:
    assert in_force(world_of(), AP1, ALL)


def test_without_takeover_forwards_are_said_and_none_is_in_the_map() -> None:
    world = world_of(takeover=False)
    assert len(world.engines[AP1].sessions[LAN].table(AP1)) == 2
    assert world.lead_in() == {}


def test_nothing_is_said_before_the_address_is_held() -> None:
    network = replace(takeover(), forwards=(WEB,))
    engine = Engine(domain(networks=(network,)))
    engine.step(FlowsListed({}), 0.0)
    assert engine.snapshot()[0] == {LAN: {}}
    assert engine.wanted()[LAN].forwards == {}


def test_a_drain_counts_forwarded_flows_and_not_the_forwards() -> None:
    world = world_of()
    anchoring = world.engines[AP1].anchoring
    assert anchoring.own_left(LAN) == 0
    world.open(AP1, called())
    assert anchoring.own_left(LAN) == 1


def test_forwards_and_their_flows_move_with_a_drain_and_return() -> None:
    world = world_of()
    world.open(AP1, called(), called(PHONE), tcp(1))
    world.give(AP1, DrainRequested(drain=True))
    assert owner(world) == AP2
    assert in_force(world, AP2, ALL)
    assert (world.flows(AP1), world.flows(AP2)) == (set(), {called(), called(PHONE), tcp(1)})
    assert world.way(AP3, called()) == AP2
    assert world.installed[AP3].sockets[WEB.inside] == AP2

    world.give(AP1, DrainRequested(drain=False))
    world.give(AP1, ReclaimRequested())
    assert owner(world) == AP1
    assert in_force(world, AP1, ALL)
    assert (world.flows(AP1), world.flows(AP2)) == ({called(), called(PHONE), tcp(1)}, set())
    assert world.installed[AP3].sockets[WEB.inside] == AP1


def test_the_kernel_is_told_which_flows_were_let_in() -> None:
    world = world_of()
    world.open(AP1, called(), tcp(1))
    (outside,) = as_forwarded(AP1, WEB)
    world.give(AP1, FlowsChanged(LAN, {called(): Nat(outside[:4] + outside[5:] + bytes(5))}))
    world.give(AP1, DrainRequested(drain=True))
    world.give(AP1, DrainRequested(drain=False))
    world.give(AP1, ReclaimRequested())
    for ap in (AP2, AP1):
        adoptions = world.seen(ap, AdoptFlows)
        assert [sorted(a.forwarded) for a in adoptions if isinstance(a, AdoptFlows)][-1:] == [
            [called()]
        ]


def opened_late(world: World) -> FlowKey:
    """A flow that ap1 has let in and tells of now."""
    world.open(AP1, called(port=50001), at=home(AP1).address)
    return called(port=50001)


def test_what_was_let_in_while_the_others_moved_moves_after_them() -> None:
    world = world_of()
    world.open(AP1, called())
    world.stall_adoption = True
    world.give(AP1, DrainRequested(drain=True))
    late = opened_late(world)
    assert (owner(world), world.flows(AP1)) == (AP1, {called(), late})
    world.finish_adoptions()
    assert (owner(world), world.flows(AP2), world.flows(AP1)) == (AP2, {called(), late}, set())


def test_what_is_told_of_when_the_address_has_moved_moves_after_it() -> None:
    world = world_of()
    world.give(AP1, DrainRequested(drain=True))
    late = opened_late(world)
    assert (owner(world), world.flows(AP2), world.flows(AP1)) == (AP2, {late}, set())
    assert world.way(AP3, late) == AP2


def test_what_has_ended_meanwhile_doesnt() -> None:
    world = world_of()
    world.stall_adoption = True
    world.give(AP1, DrainRequested(drain=True))
    world.close(AP1, opened_late(world))
    world.finish_adoptions()
    assert (owner(world), world.flows(AP2), world.flows(AP1)) == (AP2, set(), set())
    assert len(world.seen(AP2, AdoptFlows)) == 1


def test_nothing_moves_after_an_address_that_was_given_up() -> None:
    world = world_of()
    world.stall_adoption = True
    world.give(AP1, DrainRequested(drain=True))
    late = opened_late(world)
    world.give(AP1, DrainRequested(drain=False))
    world.finish_adoptions()
    assert (owner(world), world.flows(AP2), world.flows(AP1)) == (AP1, set(), {late})


def test_forwards_alone_dont_keep_an_address_from_its_home() -> None:
    world = world_of()
    world.give(AP1, DrainRequested(drain=True))
    assert in_force(world, AP2, ALL)
    world.give(AP1, DrainRequested(drain=False))
    world.rounds(UNUSED_ROUNDS)
    assert in_force(world, AP1, ALL)


def test_a_dead_anchors_forwards_and_their_flows_are_the_successors() -> None:
    world = world_of()
    world.open(AP1, called())
    world.power_off(AP1)
    world.rounds(DEAD_ROUNDS)
    assert owner(world) == AP2
    assert (world.said(AP2), world.lead_in()) == (ALL, {AP2: ALL})
    assert world.flows(AP2) == {called()}
    assert world.installed[AP3].sockets[WEB.inside] == AP2

    world.boot(AP1)
    world.rounds(DEAD_ROUNDS)
    assert in_force(world, AP2, ALL)
    world.give(AP1, ReclaimRequested())
    assert in_force(world, AP1, ALL)
    assert world.flows(AP1) == {called()}


def test_they_are_handed_on_by_who_has_taken_them_over() -> None:
    """Also where several lead to one socket: by two ports, and by two addresses."""
    more = Forward(TCP, 8081, ANN_IP, 80)
    world = World(successor=AP2, forwards={AP1: (WEB, more), AP2: (WEB,)})
    world.power_off(AP1)
    world.rounds(DEAD_ROUNDS)
    both = {**as_forwarded(AP1, WEB, more), **as_forwarded(AP2, WEB)}
    assert (world.said(AP2), world.lead_in()) == (both, {AP2: both})
    world.boot(AP1)
    world.power_off(AP1)
    world.power_off(AP2)
    world.rounds(DEAD_ROUNDS)
    assert (world.said(AP3), world.lead_in()) == (both, {AP3: both})


@pytest.mark.parametrize("who", [AP1, AP2], ids=["former owner", "heir"])
def test_a_restart_ends_no_forward(who: ApId) -> None:
    world = world_of()
    world.open(AP1, called())
    world.give(AP1, DrainRequested(drain=True))
    assert owner(world) == AP2
    world.restart(who)
    if who == AP1:
        world.give(AP1, DrainRequested(drain=True))
    assert in_force(world, AP2, ALL)
    assert world.flows(AP2) == {called()}


def test_an_heir_that_restarts_while_the_owner_is_dead_keeps_them() -> None:
    world = world_of()
    world.power_off(AP1)
    world.rounds(DEAD_ROUNDS)
    world.restart(AP2)
    assert world.lead_in() == {AP2: ALL}
    assert world.said(AP2) == ALL


def test_a_listing_of_conntrack_ends_no_forward() -> None:
    world = world_of()
    world.give(AP1, FlowsListed({LAN: {}}))
    assert in_force(world, AP1, ALL)


def test_what_the_configuration_has_counts_when_the_address_is_home() -> None:
    world = world_of()
    world.give(AP1, DrainRequested(drain=True))
    other = Forward(TCP, 8443, BEN_IP, 443)
    world.forwards[AP1] = (WEB, other)
    world.restart(AP1)
    world.give(AP1, DrainRequested(drain=True))
    assert in_force(world, AP2, ALL)
    world.give(AP1, DrainRequested(drain=False))
    world.give(AP1, ReclaimRequested())
    assert in_force(world, AP1, as_forwarded(AP1, WEB, other))


def test_a_forward_that_the_configuration_loses_ends_with_the_restart() -> None:
    world = world_of()
    world.forwards[AP1] = (WEB,)
    world.restart(AP1)
    assert in_force(world, AP1, as_forwarded(AP1, WEB))


def test_the_kernel_has_them_before_it_is_given_the_flows() -> None:
    """An agent that dies in between finds there what it has to go on with."""
    world = world_of()
    world.open(AP1, called())
    world.refuse_adoption = True
    before: list[dict[ApId, dict[SocketKey, SocketKey]]] = []
    carry_out = world._carry_out

    def noting(ap: ApId, effect: object) -> None:
        if isinstance(effect, AdoptFlows):
            before.append(world.lead_in())
        carry_out(ap, effect)  # type: ignore[arg-type]

    world._carry_out = noting  # type: ignore[method-assign]
    world.give(AP1, DrainRequested(drain=True))
    assert before == [{AP1: ALL, AP2: ALL}]
    assert in_force(world, AP1, ALL)


def test_a_client_that_only_waits_is_not_released_while_its_forward_moves() -> None:
    world = world_of()
    world.give(AP3, ClientSeen(LAN, ANN, Source.NEIGHBOUR, ANN_IP))
    world.give(AP3, ClientAged(LAN, ANN))
    world.give(AP1, DrainRequested(drain=True))
    assert owner(world) == AP2
    assert world.installed[AP2].routes == {ANN_IP: AP3}
    world.give(AP1, DrainRequested(drain=False))
    world.give(AP1, ReclaimRequested())
    assert world.installed[AP1].routes == {ANN_IP: AP3}
