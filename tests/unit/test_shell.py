"""In which order the shell does what a roam waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import replace
from ipaddress import IPv4Address
from typing import Any

from apagent.core.domain import Network
from apagent.core.engine import Engine
from apagent.core.events import (
    ClientSeen,
    Event,
    FlowsChanged,
    FlowsListed,
    PeerConnected,
    PeerDelta,
    PeerDisconnected,
    PeerSnapshot,
    Source,
)
from apagent.core.feed import FeedContents, FeedLog
from apagent.core.model import (
    AnchorStatement,
    FlowKey,
    Hold,
    NatAddress,
    NetworkName,
    Translation,
    stamped,
)
from apagent.reconcile import Reconciler
from apagent.shell import Shell
from tests.domains import ANN, ANN_IP, AP2, AP3, LAN, NAT, at, claim, domain, takeover, tcp

ADDRESS = NatAddress(LAN, IPv4Address("203.0.113.21"))


class Recorder:
    """Kernel, conntrack and observer that only note what they are asked for."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.planned: list[tuple[float, Callable[[], None]]] = []
        self.ended: list[tuple[FlowKey, ...]] = []

    def later(self, delay_s: float, action: Callable[[], None]) -> None:
        self.planned.append((delay_s, action))

    def end(self, _network: NetworkName, flows: Iterable[FlowKey]) -> None:
        self.ended.append(tuple(flows))
        self.done.append("end")

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self.done.append(name)


def shell(recorder: Recorder, networks: tuple[Network, ...] = ()) -> Shell:
    engine = Engine(domain(networks=networks))
    kernel: Any = recorder
    feed = FeedLog(1, lambda: FeedContents(*engine.snapshot(), engine.clock))
    made = Shell(engine, kernel, kernel, Reconciler(kernel, domain(), engine), feed, recorder.later)
    made.run([FlowsListed({}), PeerSnapshot(AP2, 1, {}, (claim(AP2, 1),)), PeerSnapshot(AP3, 1)])
    feed.subscribe(lambda: recorder.done.append("publish"))
    made.observers.append(lambda *_: recorder.done.append("tell"))
    recorder.done.clear()
    return made


def work_off(*events: Event) -> list[str]:
    recorder = Recorder()
    shell(recorder).run(list(events))
    return recorder.done


def test_the_peers_hear_of_an_arriving_client_before_it_is_welcomed() -> None:
    done = work_off(ClientSeen(LAN, ANN, Source.FDB, ANN_IP))
    assert done == ["apply", "publish", "welcome_client", "tell"]


def test_an_arriving_client_is_welcomed_again_while_it_is_here() -> None:
    recorder = Recorder()
    made = shell(recorder)
    made.run([ClientSeen(LAN, ANN, Source.FDB, ANN_IP)])
    (_, soon), (_, later) = recorder.planned
    recorder.done.clear()
    soon()
    made.run([PeerDelta(AP2, 9, claims=(claim(AP2, 9),))])
    later()
    assert recorder.done.count("welcome_client") == 1


def test_a_client_that_has_left_is_forgotten_when_its_route_is_there() -> None:
    here = ClientSeen(LAN, ANN, Source.FDB, ANN_IP)
    recorder = Recorder()
    made = shell(recorder)
    made.run([here])
    recorder.done.clear()
    made.run([PeerDelta(AP2, 9, claims=(claim(AP2, 9),))])
    assert recorder.done == ["apply", "publish", "forget_client", "tell"]


def test_a_flow_ends_here_when_its_packets_go_elsewhere() -> None:
    done = work_off(FlowsChanged(LAN, {tcp(1): NAT}), PeerDelta(AP2, 1, {LAN: {tcp(1): at(0)}}))
    assert done.index("apply") < done.index("end")


def test_the_peers_need_not_wait_for_the_log() -> None:
    recorder = Recorder()

    async def emit() -> list[str]:
        made = shell(recorder)
        made.emit(ClientSeen(LAN, ANN, Source.FDB, ANN_IP))
        await asyncio.sleep(0)
        at_once = list(recorder.done)
        await asyncio.sleep(0)
        return at_once

    at_once = asyncio.run(emit())
    assert "publish" in at_once
    assert recorder.done == [*at_once, "tell"]


def test_flows_whose_address_has_moved_end_when_all_may_know() -> None:
    """Until then packets of theirs come here, and are translated instead of reset."""
    recorder = Recorder()
    made = shell(recorder, networks=(takeover(),))
    moving = Translation(ADDRESS.address, 40000).packed
    made.run([FlowsChanged(LAN, {tcp(1): moving, tcp(2): NAT})])
    recorder.planned.clear()
    recorder.done.clear()
    hold = Hold(ADDRESS, 9)
    both = {tcp(1): stamped(moving, 0), tcp(2): at(0)}
    made.run([PeerDelta(AP2, 9, {LAN: both}, anchor=AnchorStatement(holds=(hold,)))])
    assert recorder.ended == [(tcp(2),)]
    ((_, later),) = recorder.planned
    later()
    assert recorder.ended == [(tcp(2),), (tcp(1),)]


def with_a_flow_that_moves(recorder: Recorder) -> tuple[Shell, PeerDelta]:
    """A shell that anchors `tcp(1)`, and what AP2 says when it has the flow's address."""
    made = shell(recorder, networks=(takeover(),))
    moving = Translation(ADDRESS.address, 40000).packed
    made.run([FlowsChanged(LAN, {tcp(1): moving})])
    recorder.planned.clear()
    hold = AnchorStatement(holds=(Hold(ADDRESS, 9),))
    return made, PeerDelta(AP2, 9, {LAN: {tcp(1): stamped(moving, 0)}}, anchor=hold)


def test_flows_whose_address_has_moved_go_on_while_a_peer_cannot_know() -> None:
    recorder = Recorder()
    made, taken = with_a_flow_that_moves(recorder)
    made.run([PeerDisconnected(AP3, "killed")])
    made.run([taken])
    ((_, later),) = recorder.planned
    later()
    assert recorder.ended == []
    made.run([PeerConnected(AP3), PeerSnapshot(AP3, 9)])
    recorder.planned[-1][1]()
    assert recorder.ended == []
    recorder.planned[-1][1]()
    assert recorder.ended == [(tcp(1),)]


def test_flows_go_on_until_the_heir_has_their_address() -> None:
    recorder = Recorder()
    made, taken = with_a_flow_that_moves(recorder)
    ready = AnchorStatement(ready=frozenset({ADDRESS}))
    made.run([replace(taken, anchor=ready)])
    for _ in range(3):
        recorder.planned[-1][1]()
    assert recorder.ended == []
    made.run([taken])
    for _ in range(2):
        recorder.planned[-1][1]()
    assert recorder.ended == [(tcp(1),)]


def test_flows_that_have_come_back_by_then_go_on() -> None:
    recorder = Recorder()
    made, taken = with_a_flow_that_moves(recorder)
    made.run([taken])
    ((_, later),) = recorder.planned
    made.run([PeerDelta(AP2, 9, {LAN: {tcp(1): None}}, anchor=AnchorStatement())])
    later()
    assert recorder.ended == []
