"""What watchers are told of flows."""

from __future__ import annotations

from apagent.control.narrate import flow_events
from apagent.core.effects import Publish
from apagent.core.events import DrainRequested, PeerDelta, PeerPart, SyncTimedOut
from apagent.core.model import ESTABLISHED, STATE, Nat, SessionChanges, socket_of, standing_of
from tests.anchors_world import World
from tests.domains import AP1, AP2, AP3, LAN, NAT, udp

ESTABLISHED_NAT = Nat(NAT[:STATE] + bytes([ESTABLISHED]))


def told(changes: SessionChanges) -> list[tuple[str, str]]:
    """Kind and text of each view of what this AP publishes."""
    views = flow_events(SyncTimedOut(), [Publish({LAN: changes}, (), 1)], AP1, 0.0)
    return [(view.kind, view.text) for view in views]


def test_a_flow_is_opened_once_and_its_answer_is_no_second_opening() -> None:
    flow = "udp 10.77.1.1:1 > 198.51.100.10:53"
    assert told({udp(1): NAT}) == [("flow-opened", f"flow opened at ap1: {flow}")]
    assert told({udp(1): ESTABLISHED_NAT}) == [
        ("flow-established", f"flow established at ap1: {flow}")
    ]
    assert told({udp(1): None}) == [("flow-closed", f"flow closed at ap1: {flow}")]


def test_a_port_forward_is_no_flow() -> None:
    assert told({standing_of(socket_of(udp(1))): NAT}) == []


def test_peers_flows_are_told_with_their_anchor() -> None:
    delta = PeerDelta(AP2, 1, {LAN: {udp(1): NAT}})
    [view] = flow_events(delta, [], AP1, 7.0)
    assert (view.time, view.fields["anchor"], view.fields["network"]) == (7.0, AP2, LAN)


def test_a_flow_that_moves_opens_at_its_new_anchor_and_closes_where_it_was() -> None:
    world = World()
    world.open(AP1, udp(1))
    world.effects = {ap: [] for ap in world.ids}
    world.give(AP1, DrainRequested(drain=True))
    told = {
        ap: [view.kind for view in flow_events(SyncTimedOut(), world.effects[ap], ap, 0.0)]
        for ap in world.ids
    }
    assert told.pop(AP1) == ["flow-closed"]
    assert sorted(told.values()) == [[], ["flow-opened"]]


def test_what_a_snapshot_brings_is_not_told() -> None:
    assert list(flow_events(PeerPart(AP3, {LAN: {udp(1): NAT}}), [], AP1, 0.0)) == []
