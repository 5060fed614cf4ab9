"""Rounds of probes, ARP questions and adoptions, on a clock that the test turns."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import count
from typing import Any

import pytest

from apagent import anchor_work
from apagent.anchor_work import AnchorWork
from apagent.core.effects import AdoptFlows, DefendAddress, LoosenFlows, PokeClients, ProbeAddress
from apagent.core.events import (
    AddressConflict,
    AddressProbed,
    AdoptionFailed,
    Event,
    FlowsAdopted,
    ProbesAnswered,
)
from apagent.core.liveness import ROUND_S
from apagent.core.model import ApId, FlowKey, Mac, Nat, NatAddress, NetworkName
from apagent.errors import KernelFault
from tests.anchors_world import FOREIGN_MAC, home
from tests.domains import ANN, AP1, AP2, AP3, BEN, LAN, NAT, tcp

ADDRESS = home(AP1)


class Clock:
    """Calls what is due when the test lets time pass."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def later(self, delay_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._due, (self.now + delay_s, next(self._numbers), action))

    def pass_s(self, seconds: float) -> None:
        end = self.now + seconds
        while self._due and self._due[0][0] <= end + 1e-9:
            self.now, _, action = heapq.heappop(self._due)
            action()
        self.now = end


class Parts:
    """Every adapter in one; `calls` is what they were asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.who_answers: frozenset[ApId] = frozenset({AP2})
        self.trouble: dict[NetworkName, str] = {LAN: ""}
        self.heard: list[tuple[NatAddress, Mac]] = []
        self.fault: KernelFault | None = None
        self.refused: set[FlowKey] = set()
        """Flows whose translation another flow has."""
        self.events: list[Event] = []
        self.clear: list[NatAddress] = []
        """Addresses that are no longer asked for."""

    def probe(self, *what: object) -> None:
        self._note("probe", *what)

    def stop_probing(self, nat: NatAddress) -> None:
        self.clear.append(nat)

    def announce(self, nat: NatAddress) -> None:
        self._note("announce", nat)

    def adopt(
        self,
        network: NetworkName,
        sessions: Mapping[FlowKey, Nat],
        forwarded: Collection[FlowKey],
    ) -> Collection[FlowKey]:
        self._note("adopt", network, len(sessions), *sessions.keys() & forwarded)
        return sessions.keys() & self.refused

    def loosen(self, flows: Iterable[FlowKey]) -> None:
        self._note("loosen", list(flows))

    def poke(self, network: NetworkName, clients: Mapping[Mac, Iterable[FlowKey]]) -> None:
        self._note("poke", network, clients)

    def read(self) -> list[tuple[NatAddress, Mac]]:
        heard, self.heard = self.heard, []
        return heard

    def close(self) -> None:
        self._note("close")

    def _note(self, *call: object) -> None:
        if self.fault is not None:
            raise self.fault
        self.calls.append(call)


class Tunnel(Parts):
    def answered(self) -> frozenset[ApId]:
        return self.who_answers


class Uplinks(Parts):
    def answered(self) -> Mapping[NetworkName, str]:
        return self.trouble


class Made:
    """An upkeep with all that is around it."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.tunnel, self.uplinks, self.others = Tunnel(), Uplinks(), Parts()
        self.events: list[Event] = []
        others: Any = self.others
        self.work = AnchorWork(
            (AP2, AP3),
            self.events.append,
            self.clock.later,
            tunnel=self.tunnel,
            uplinks=self.uplinks,
            segment=others,
            flows=others,
            kernel=others,
            spared=lambda: [AP3],
        )


@pytest.fixture
def made() -> Made:
    return Made()


def test_a_round_tells_who_answered_and_asks_again(made: Made) -> None:
    made.work.begin()
    made.clock.pass_s(3 * ROUND_S)
    assert made.events == [ProbesAnswered(frozenset({AP2}), {LAN: ""})] * 3
    assert made.tunnel.calls == [("probe", (AP2, AP3), [AP3])] * 4
    assert len(made.uplinks.calls) == 4


def test_a_probe_that_cannot_be_sent_ends_no_round(made: Made) -> None:
    made.tunnel.fault = KernelFault("no device")
    made.work.begin()
    made.clock.pass_s(2 * ROUND_S)
    assert len(made.events) == 2


def test_an_address_that_nobody_answers_for_is_free(made: Made) -> None:
    made.work.carry_out(ProbeAddress(ADDRESS))
    made.clock.pass_s(1.0)
    assert made.others.calls == [("probe", ADDRESS)] * anchor_work.ARP_PROBES
    assert made.events == [AddressProbed(ADDRESS, None)]
    assert made.others.clear == [ADDRESS]


def test_one_answer_is_enough_and_no_more_is_asked(made: Made) -> None:
    made.work.carry_out(ProbeAddress(ADDRESS))
    made.clock.pass_s(0.0)
    made.others.heard = [(ADDRESS, FOREIGN_MAC)]
    made.work.listen()
    made.clock.pass_s(1.0)
    assert made.others.calls == [("probe", ADDRESS)]
    assert made.events == [AddressProbed(ADDRESS, FOREIGN_MAC)]


def test_a_use_of_an_address_that_was_not_asked_for_is_a_conflict(made: Made) -> None:
    made.others.heard = [(ADDRESS, FOREIGN_MAC)]
    made.work.listen()
    assert made.events == [AddressConflict(ADDRESS, FOREIGN_MAC)]


def test_a_question_that_could_not_be_asked_is_no_sign_of_a_free_address(made: Made) -> None:
    made.others.fault = KernelFault("the uplink is gone")
    made.work.carry_out(ProbeAddress(ADDRESS))
    made.clock.pass_s(1.0)
    assert made.events == [AddressProbed(ADDRESS, anchor_work.UNKNOWN_USER)]


def test_many_flows_are_adopted_in_parts_and_told_of_at_the_end(made: Made) -> None:
    sessions = {tcp(port): NAT for port in range(1, 2 * anchor_work.ADOPTED_A_TURN + 2)}
    made.work.carry_out(AdoptFlows(ADDRESS, sessions))
    assert made.others.calls == [("adopt", LAN, anchor_work.ADOPTED_A_TURN)]
    made.clock.pass_s(0.0)
    assert [call[2] for call in made.others.calls] == [anchor_work.ADOPTED_A_TURN] * 2 + [1]
    assert made.events == [FlowsAdopted(ADDRESS, sessions)]


def test_flows_that_the_kernel_leaves_out_are_told(made: Made) -> None:
    sessions = {tcp(port): NAT for port in range(1, anchor_work.ADOPTED_A_TURN + 2)}
    first, last = tcp(1), tcp(anchor_work.ADOPTED_A_TURN + 1)
    made.others.refused = {first, last}
    made.work.carry_out(AdoptFlows(ADDRESS, sessions))
    made.clock.pass_s(0.0)
    assert made.events == [FlowsAdopted(ADDRESS, sessions, frozenset({first, last}))]


def test_flows_that_were_forwarded_are_adopted_as_such(made: Made) -> None:
    sessions = dict.fromkeys((tcp(1), tcp(2)), NAT)
    made.work.carry_out(AdoptFlows(ADDRESS, sessions, frozenset({tcp(2)})))
    assert made.others.calls == [("adopt", LAN, 2, tcp(2))]


def test_no_flows_are_adopted_at_once(made: Made) -> None:
    made.work.carry_out(AdoptFlows(ADDRESS, {}))
    assert made.events == [FlowsAdopted(ADDRESS, {})]


def test_an_adoption_that_the_kernel_refuses_is_told(made: Made) -> None:
    made.others.fault = KernelFault("no room")
    made.work.carry_out(AdoptFlows(ADDRESS, {tcp(1): NAT}))
    assert made.events == [AdoptionFailed(ADDRESS, "no room")]


def test_many_flows_are_loosened_in_parts(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anchor_work, "ADOPTED_A_TURN", 2)
    flows = tuple(map(tcp, range(1, 4)))
    made.work.carry_out(LoosenFlows(flows))
    assert made.others.calls == [("loosen", list(flows[:2]))]
    made.clock.pass_s(0.0)
    assert made.others.calls[1:] == [("loosen", [flows[2]])]


def test_many_clients_are_roused_bit_by_bit(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anchor_work, "POKED_A_TURN", 2)
    flows = tuple(map(tcp, range(1, 4)))
    made.work.carry_out(PokeClients(LAN, {ANN: flows, BEN: flows[:2]}))
    assert made.others.calls == [("poke", LAN, {ANN: list(flows[:2])})]
    made.clock.pass_s(anchor_work.POKE_PAUSE_S)
    assert made.others.calls[1:] == [("poke", LAN, {ANN: [flows[2]], BEN: [flows[0]]})]
    made.clock.pass_s(anchor_work.POKE_AGAIN_S)
    assert made.others.calls[2:4] == [("poke", LAN, {BEN: [flows[1]]}), made.others.calls[0]]
    made.clock.pass_s(anchor_work.POKE_AGAIN_S)
    assert len(made.others.calls) == 6


def test_the_rest_is_passed_on(made: Made) -> None:
    made.work.carry_out(DefendAddress(ADDRESS))
    made.work.carry_out(PokeClients(LAN, {ANN: (tcp(1),)}))
    poke = ("poke", LAN, {ANN: [tcp(1)]})
    assert made.others.calls == [("announce", ADDRESS), poke]
    made.clock.pass_s(1.0)
    assert made.others.calls[2:] == [poke]
    made.others.fault = KernelFault("gone")
    made.work.carry_out(DefendAddress(ADDRESS))
