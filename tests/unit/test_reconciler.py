"""The kernel is made what the engine says, after faults and after what others did to it."""

from __future__ import annotations

from dataclasses import dataclass, field

from apagent.core.engine import Engine
from apagent.core.events import ClientSeen, FlowsListed, PeerDelta, PeerSnapshot, Source
from apagent.core.model import socket_of
from apagent.reconcile import Reconciler
from tests.domains import ANN, ANN_IP, AP2, AP3, BEN, BEN_IP, LAN, at, claim, domain, tcp, udp
from tests.fakes.kernel import FakeDataPath, FakeKernel

DOMAIN = domain()
FLOW, OTHER = tcp(1), tcp(2)


@dataclass
class Setting:
    """An engine in sync that knows of a client here, one elsewhere, and flows at a peer."""

    engine: Engine = field(default_factory=lambda: Engine(DOMAIN))
    path: FakeDataPath = field(default_factory=FakeDataPath)

    def __post_init__(self) -> None:
        self.path.prepare(DOMAIN)
        self.path.release_hold()
        self.reconciler = Reconciler(self.path, DOMAIN, self.engine)
        for event in (
            FlowsListed({}),
            PeerSnapshot(
                AP2, 1, {LAN: {FLOW: at(0), udp(3): at(0)}}, (claim(AP2, 1, BEN, BEN_IP),)
            ),
            PeerSnapshot(AP3, 1),
            ClientSeen(LAN, ANN, Source.NEIGHBOUR, ANN_IP),
        ):
            self.engine.step(event, 0.0)
        self.reconciler.flush()

    @property
    def kernel(self) -> FakeKernel:
        return self.path.kernel

    @property
    def is_right(self) -> bool:
        return self.kernel.states == self.engine.wanted()

    def open_flow(self) -> None:
        self.engine.step(PeerDelta(AP2, 2, {LAN: {OTHER: at(0)}}), 0.0)
        self.reconciler.flush()


def faults(setting: Setting) -> list[str]:
    fault = setting.reconciler.fault
    return [] if fault is None else [fault]


def test_the_kernel_holds_what_is_wanted() -> None:
    assert Setting().is_right


def test_a_check_of_what_is_right_changes_nothing() -> None:
    setting = Setting()
    applied = len(setting.kernel.applied)
    assert setting.reconciler.check(session_maps=True)
    assert not any(setting.kernel.applied[applied:])
    assert setting.reconciler.repairs == 0


def test_what_others_removed_comes_back() -> None:
    setting = Setting()
    state = setting.kernel.states[LAN]
    del state.routes[BEN_IP], state.neighbours[ANN_IP], state.known[ANN_IP], state.flows[FLOW]
    state.sockets[socket_of(udp(3))] = AP3
    assert setting.reconciler.check(session_maps=True)
    assert setting.is_right
    assert setting.reconciler.repairs == 1


def test_a_check_without_the_session_maps_leaves_them_alone() -> None:
    setting = Setting()
    state = setting.kernel.states[LAN]
    del state.routes[BEN_IP], state.flows[FLOW]
    assert setting.reconciler.check(session_maps=False)
    assert BEN_IP in state.routes
    assert FLOW not in state.flows
    assert setting.reconciler.check(session_maps=True)
    assert setting.is_right


def test_a_check_loses_no_change_that_waits() -> None:
    setting = Setting()
    setting.engine.step(PeerDelta(AP2, 2, {LAN: {OTHER: at(0)}}), 0.0)
    assert setting.reconciler.check(session_maps=False)
    assert setting.is_right


def test_damage_to_our_objects_counts_as_a_repair() -> None:
    setting = Setting()
    setting.kernel.damage = ["policy rule 700"]
    assert setting.reconciler.check(session_maps=False)
    assert setting.reconciler.repairs == 1


def test_a_refused_change_is_mended_at_once() -> None:
    setting = Setting()
    del setting.kernel.states[LAN].flows[FLOW]
    setting.engine.step(PeerDelta(AP2, 2, {LAN: {FLOW: None, OTHER: at(0)}}), 0.0)
    setting.reconciler.flush()
    assert setting.is_right
    assert faults(setting) == []


def test_a_fault_in_the_middle_of_a_batch_leaves_the_state_right() -> None:
    for after in range(5):
        setting = Setting()
        setting.path.fail_next("apply", after=after)
        setting.engine.step(ClientSeen(LAN, BEN, Source.FDB), 0.0)
        setting.open_flow()
        assert setting.is_right


def test_a_standing_fault_is_said_and_what_the_kernel_takes_is_installed() -> None:
    setting = Setting()
    setting.path.fail_next("apply")
    setting.path.fail_next("read")
    setting.open_flow()
    assert faults(setting) == ["fake read"]
    setting.engine.step(ClientSeen(LAN, BEN, Source.FDB), 0.0)
    setting.reconciler.flush()
    assert setting.kernel.states[LAN].neighbours.keys() == {ANN_IP, BEN_IP}
    assert setting.reconciler.check(session_maps=False)
    assert faults(setting) == []
    assert setting.is_right


def test_what_can_not_be_prepared_keeps_nothing_else_from_being_mended() -> None:
    setting = Setting()
    del setting.kernel.states[LAN].routes[BEN_IP]
    setting.path.fail_next("prepare")
    assert not setting.reconciler.check(session_maps=False)
    assert faults(setting) == ["fake prepare"]
    assert setting.is_right
    setting.open_flow()
    assert setting.is_right


def test_a_table_made_anew_does_not_hold_back_once_it_is_filled() -> None:
    setting = Setting()
    setting.kernel.domain = None
    for state in setting.kernel.states.values():
        state.flows.clear()
    assert setting.reconciler.check(session_maps=True)
    assert setting.is_right
    assert not setting.kernel.holding


def test_a_table_made_anew_holds_back_until_we_are_in_sync() -> None:
    setting = Setting()
    setting.kernel.domain = None
    setting.engine.in_sync = False
    assert setting.reconciler.check(session_maps=True)
    assert setting.kernel.holding
