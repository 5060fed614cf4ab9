"""What the kernel should hold of clients at home: nothing is looked up for them."""

from __future__ import annotations

from apagent.core.clients import ClientTable
from apagent.core.desired import (
    ANY_ANCHOR,
    AnchorState,
    Change,
    NetworkDelta,
    drain_changes,
    wanted,
)
from apagent.core.model import Claim
from apagent.core.session_tables import SessionTables
from tests.domains import ANN, ANN_IP, AP1, AP2, LAN, NAT, tcp

QUIET = AnchorState()
DRAINING = AnchorState(diverted={ANY_ANCHOR: AP2})


class World:
    """AP1's tables, with Ann there."""

    def __init__(self) -> None:
        self.sessions = SessionTables(AP1, [AP2])
        self.clients = ClientTable(AP1)
        self.anchors = QUIET
        self.claim(1)

    def claim(self, generation: int) -> None:
        claim = Claim(LAN, ANN, AP1, generation, addresses=frozenset({ANN_IP}))
        self.clients.merge(claim, 0.0)

    def drain(self, anchors: AnchorState | None = None) -> NetworkDelta:
        before, self.anchors = self.anchors, anchors or self.anchors
        return drain_changes(self.sessions, self.clients, before, self.anchors)

    def is_home(self) -> bool:
        return wanted(self.sessions, self.clients, self.anchors).home == {ANN_IP: ANN}


def test_a_client_that_has_come_is_at_home_unless_a_peer_has_sessions_of_it() -> None:
    world = World()
    assert world.drain().home == {ANN_IP: Change(None, ANN)}
    assert world.is_home()
    world = World()
    world.sessions.apply(AP2, {tcp(1): NAT})
    assert world.drain().home == {}
    assert not world.is_home()


def test_it_ends_with_a_first_session_and_begins_after_the_last_one() -> None:
    world = World()
    world.drain()
    world.sessions.apply(AP2, {tcp(1): NAT, tcp(2): NAT})
    assert world.drain().home == {ANN_IP: Change(ANN, None)}
    assert not world.is_home()
    world.sessions.apply(AP2, {tcp(1): None})
    assert world.drain().home == {}
    world.sessions.apply(AP2, {tcp(2): None})
    assert world.drain().home == {ANN_IP: Change(None, ANN)}
    assert world.is_home()


def test_a_session_that_comes_and_goes_between_costs_nothing() -> None:
    world = World()
    world.drain()
    world.sessions.apply(AP2, {tcp(1): NAT})
    world.sessions.apply(AP2, {tcp(1): None})
    assert not world.drain()


def test_our_own_sessions_are_no_reason() -> None:
    world = World()
    world.drain()
    world.sessions.apply(AP1, {tcp(1): NAT})
    assert world.drain().home == {}
    assert world.is_home()


def test_nobody_is_at_home_while_another_ap_anchors_new_flows() -> None:
    world = World()
    world.drain()
    assert world.drain(DRAINING).home == {ANN_IP: Change(ANN, None)}
    assert not world.is_home()
    world.sessions.apply(AP2, {tcp(1): NAT})
    assert world.drain(QUIET).home == {}
    world.sessions.apply(AP2, {tcp(1): None})
    assert world.drain().home == {ANN_IP: Change(None, ANN)}


def test_a_provisional_client_is_not_at_home() -> None:
    world = World()
    world.clients = ClientTable(AP1)
    world.claim(0)
    assert world.drain().home == {}
    assert not world.is_home()
