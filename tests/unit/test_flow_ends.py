"""Flows that are to end, and a kernel that refuses to end them at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from ipaddress import IPv4Address
from operator import itemgetter

import pytest

from apagent import flow_ends
from apagent.core.domain import Network
from apagent.core.effects import EndFlows
from apagent.core.engine import Engine
from apagent.core.events import (
    AddressProbed,
    ClientSeen,
    Event,
    FlowsListed,
    KernelAdopted,
    PeerDelta,
    PeerSnapshot,
    ProbesAnswered,
    Source,
)
from apagent.core.feed import FeedContents, FeedLog
from apagent.core.model import AnchorStatement, FlowKey, Hold, Nat, NatAddress, Translation, stamped
from apagent.flow_ends import AGAIN_S, ATTEMPTS, MOVED_S
from apagent.reconcile import Reconciler
from apagent.shell import Shell
from tests.domains import ANN, ANN_IP, AP2, AP3, BEN, LAN, NAT, at, claim, domain, takeover, tcp
from tests.fakes.kernel import FakeDataPath, FakeFlowMonitor


class Ap:
    """A shell in sync, its conntrack table, and a clock that is turned by hand."""

    def __init__(self, *networks: Network) -> None:
        self.conntrack = FakeFlowMonitor()
        self._now = 0.0
        self._planned: list[tuple[float, Callable[[], None]]] = []
        known = domain(networks=networks)
        engine = Engine(known)
        path = FakeDataPath()
        path.prepare(known)
        feed = FeedLog(1, lambda: FeedContents(*engine.snapshot(), engine.clock))
        reconciler = Reconciler(path, known, engine)
        self._shell = Shell(engine, path, self.conntrack, reconciler, feed, self._later)
        self.take(FlowsListed({}), PeerSnapshot(AP2, 1), PeerSnapshot(AP3, 1))

    def _later(self, delay_s: float, action: Callable[[], None]) -> None:
        self._planned.append((self._now + delay_s, action))

    def take(self, *events: Event) -> None:
        """What happens, and what conntrack reports after it."""
        self._shell.run(list(events))
        while reports := self.conntrack.read():
            self._shell.run(list(reports))

    def open(self, *flows: FlowKey, nat: Nat = NAT) -> None:
        for flow in flows:
            self.conntrack.open_flow(LAN, flow, nat)
        self.take()

    def see(self, mac: object) -> None:
        self.take(ClientSeen(LAN, ANN if mac == ANN else BEN, Source.NEIGHBOUR, ANN_IP))

    def wait(self, delay_s: float) -> None:
        """Let everything happen that was planned until then."""
        end = self._now + delay_s
        while (plan := min(self._planned, default=None, key=itemgetter(0))) and plan[0] <= end:
            self._planned.remove(plan)
            self._now = plan[0]
            plan[1]()
            self.take()
        self._now = end

    def wait_until_refused(self) -> None:
        """Until the kernel has refused what it was to refuse."""
        for _ in range(20):
            if self.conntrack.refused_ends:
                self.wait(AGAIN_S / 2)
        assert self.conntrack.refused_ends == 0

    @property
    def flows(self) -> set[FlowKey]:
        return set(self.conntrack.tables.get(LAN, {}))

    @property
    def is_done(self) -> bool:
        """Whether nothing is planned any more."""
        return not self._planned


def losing(*flows: FlowKey) -> PeerDelta:
    """AP2 has the better right to these flows."""
    return PeerDelta(AP2, 1, {LAN: dict.fromkeys(flows, at(0))})


def test_what_the_kernel_refuses_is_tried_again_until_it_ends() -> None:
    ap = Ap()
    ap.open(tcp(1), tcp(2))
    ap.conntrack.refused_ends = 3
    ap.take(losing(tcp(1), tcp(2)))
    for _ in range(3):
        assert ap.flows == {tcp(2)}
        assert not ap.is_done
        ap.wait(AGAIN_S)
    assert ap.flows == set()
    assert ap.is_done


def test_what_is_right_again_by_then_goes_on() -> None:
    ap = Ap()
    ap.open(tcp(1), tcp(2))
    ap.conntrack.refused_ends = 2
    ap.take(losing(tcp(2)))
    ap.take(losing(tcp(1)))
    ap.take(PeerDelta(AP2, 1, {LAN: {tcp(2): None}}))
    ap.wait(AGAIN_S)
    assert ap.flows == {tcp(2)}


def test_many_flows_end_in_turns_and_what_is_right_again_by_then_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flow_ends, "ENDED_A_TURN", 2)
    ap = Ap()
    flows = sorted(map(tcp, range(1, 6)))
    ap.open(*flows)
    ap.take(losing(*flows))
    assert ap.flows == set(flows[2:])
    ap.take(PeerDelta(AP2, 1, {LAN: {flows[3]: None}}))
    ap.wait(0.0)
    assert ap.flows == {flows[3]}


def test_each_turn_judges_only_the_flows_that_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow_ends, "ENDED_A_TURN", 2)
    judged: list[int] = []
    judge = Engine.still_to_end

    def counted(
        engine: Engine, ending: EndFlows, before: Mapping[FlowKey, Nat | None]
    ) -> set[FlowKey]:
        judged.append(len(before))
        return judge(engine, ending, before)

    monkeypatch.setattr(Engine, "still_to_end", counted)
    ap = Ap()
    flows = sorted(map(tcp, range(1, 10)))
    ap.open(*flows)
    ap.take(losing(*flows))
    ap.wait(0.0)
    assert ap.flows == set()
    assert judged == [2, 2, 2, 1]


def test_flows_of_a_moved_address_end_in_turns_though_its_home_has_never_been_heard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flow_ends, "ENDED_A_TURN", 2)
    ap = Ap(takeover())
    foreign = NatAddress(LAN, IPv4Address("203.0.113.99"))
    ap.take(KernelAdopted(LAN, {}, {}, {}, frozenset({foreign.address})))
    ap.open(*map(tcp, range(1, 6)), nat=Translation(foreign.address, 40000).packed)
    ap.take(PeerDelta(AP2, 9, anchor=AnchorStatement(holds=(Hold(foreign, 9),))))
    ap.wait(3 * MOVED_S)
    assert ap.flows == set()


def test_what_a_new_owner_of_the_address_opens_meanwhile_is_its_own() -> None:
    ap = Ap()
    ap.see(ANN)
    ap.open(tcp(1), tcp(2))
    ap.conntrack.refused_ends = 1
    ap.see(BEN)
    assert ap.flows == {tcp(2)}
    ap.open(tcp(1))  # the same to the kernel as ANN's, which has ended
    ap.open(tcp(3))
    ap.wait(AGAIN_S)
    assert ap.flows == {tcp(1), tcp(3)}


def test_flows_of_an_address_that_is_back_at_their_client_go_on() -> None:
    ap = Ap()
    ap.see(ANN)
    ap.open(tcp(1))
    ap.conntrack.refused_ends = 1
    taken = claim(AP2, 9, BEN, ANN_IP)
    ap.take(PeerDelta(AP2, 9, claims=(taken,)))
    assert ap.conntrack.refused_ends == 0
    ap.take(PeerDelta(AP2, 9, claims=(replace(taken, addresses=frozenset(), withdrawn=True),)))
    ap.wait(AGAIN_S)
    assert ap.flows == {tcp(1)}


def test_flows_of_an_address_that_has_moved_on_are_judged_by_its_next_owner() -> None:
    ap = Ap()
    ap.see(ANN)
    ap.open(tcp(1))
    ap.conntrack.refused_ends = 2
    ap.see(BEN)
    ap.see(ANN)
    assert ap.flows == {tcp(1)}
    ap.wait(AGAIN_S)
    assert ap.flows == set()


@pytest.mark.parametrize("back", [False, True])
def test_flows_behind_a_dead_uplink_go_on_if_it_is_back(back: bool) -> None:
    ap = Ap()

    def rounds(trouble: str) -> None:
        for _ in range(20):
            ap.take(ProbesAnswered(frozenset({AP2, AP3}), {LAN: trouble}))

    rounds("")
    ap.open(tcp(1))
    ap.conntrack.refused_ends = 1
    rounds("no carrier")
    assert ap.conntrack.refused_ends == 0
    if back:
        rounds("")
    ap.wait(AGAIN_S)
    assert ap.flows == ({tcp(1)} if back else set())


@pytest.mark.parametrize("back", [False, True])
def test_flows_whose_nat_address_has_moved_go_on_if_it_is_back(back: bool) -> None:
    ap = Ap(takeover())
    address = NatAddress(LAN, IPv4Address("203.0.113.21"))
    moving = Translation(address.address, 40000).packed
    ap.open(tcp(1), nat=moving)
    theirs = {LAN: {tcp(1): stamped(moving, 0)}}
    ap.take(PeerDelta(AP2, 9, theirs, anchor=AnchorStatement(holds=(Hold(address, 9),))))
    ap.conntrack.refused_ends = 1
    ap.wait_until_refused()
    assert ap.flows == {tcp(1)}
    if back:
        ap.take(PeerDelta(AP2, 10, {LAN: {tcp(1): None}}, anchor=AnchorStatement()))
    ap.wait(AGAIN_S + 2 * MOVED_S)
    assert ap.flows == ({tcp(1)} if back else set())


@pytest.mark.parametrize("back", [False, True])
def test_flows_of_an_address_that_we_let_go_of_go_on_if_we_hold_it_again(back: bool) -> None:
    ap = Ap(takeover())
    address = NatAddress(LAN, IPv4Address("203.0.113.21"))

    def hold_it() -> None:
        for _ in range(60):
            ap.take(ProbesAnswered(frozenset({AP2, AP3}), {LAN: ""}), AddressProbed(address, None))

    hold_it()
    ap.open(tcp(1), nat=Translation(address.address, 40000).packed)
    ap.take(PeerDelta(AP2, 99, anchor=AnchorStatement(holds=(Hold(address, 99),))))
    ap.conntrack.refused_ends = 2  # as the loser of the address, and as one who yields it
    ap.wait_until_refused()
    assert ap.flows == {tcp(1)}
    if back:
        ap.take(PeerDelta(AP2, 100, anchor=AnchorStatement()))
        hold_it()
    ap.wait(AGAIN_S + 2 * MOVED_S)
    assert ap.flows == ({tcp(1)} if back else set())


def test_a_kernel_that_never_ends_them_is_not_asked_for_ever(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ap = Ap()
    ap.open(tcp(1))
    ap.conntrack.refused_ends = 2 * ATTEMPTS
    with caplog.at_level(logging.WARNING):
        ap.take(losing(tcp(1)))
        for _ in range(2 * ATTEMPTS):
            ap.wait(AGAIN_S)
    assert ap.conntrack.refused_ends == ATTEMPTS
    assert ap.is_done
    first, last = (record.getMessage() for record in caplog.records)
    assert first.endswith("; trying again")
    assert last == "1 flows go on here that should end: the kernel refuses"
