"""What an agent makes of the kernel that it finds at its start."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable

import pytest

from apagent import agent as agent_module
from apagent.agent import Agent
from apagent.core.engine import Engine
from apagent.core.events import ClientSeen, PeerSnapshot, Source
from apagent.core.feed import FeedContents, FeedLog
from apagent.core.model import Claim, socket_of
from apagent.errors import KernelFault
from apagent.kernel.port import NetworkState
from apagent.reconcile import Reconciler
from apagent.shell import Shell
from tests.domains import ANN, ANN_IP, AP1, AP2, AP3, BEN, BEN_IP, LAN, NAT, domain, udp
from tests.fakes.kernel import (
    FakeClientMonitor,
    FakeDataPath,
    FakeFlowMonitor,
    FakeKernel,
    FakeStateMonitor,
)


class Start:
    """An agent that starts on what an earlier one left: `state`, and the bridge's `learned`."""

    def __init__(self, state: NetworkState) -> None:
        self.engine = Engine(domain())
        self.path = FakeDataPath(FakeKernel(domain=domain(), states={LAN: state}))
        self.flows, self.clients = FakeFlowMonitor(), FakeClientMonitor()
        self.reconciler = Reconciler(self.path, domain(), self.engine)
        feed = FeedLog(1, lambda: FeedContents(*self.engine.snapshot(), self.engine.clock))
        self.shell = Shell(
            self.engine, self.path, self.flows, self.reconciler, feed, lambda *_: None
        )
        self.path.prepare(domain())

    def do(self, *then: Callable[[Agent], object]) -> None:
        """Let it adopt, and whatever else."""

        async def run() -> None:
            agent = Agent(
                self.engine,
                self.shell,
                self.reconciler,
                self.path,
                self.flows,
                self.clients,
                FakeStateMonitor(),
            )
            agent.adopt()
            for action in then:
                action(agent)
                await asyncio.sleep(0)
            agent.upkeep.close()

        asyncio.run(run())

    @property
    def installed(self) -> NetworkState:
        return self.path.kernel.states[LAN]


def in_sync(start: Start) -> list[Claim]:
    """Let both peers speak; what the agent claims then."""
    start.shell.run([PeerSnapshot(AP2, 7), PeerSnapshot(AP3, 7)])
    return start.engine.snapshot()[1]


def test_sockets_of_peers_stay_until_they_speak() -> None:
    socket = socket_of(udp(1))
    start = Start(NetworkState(sockets={socket: AP2}))
    start.do()
    assert start.installed.sockets == {socket: AP2}
    start.shell.run([PeerSnapshot(AP2, 0)])
    assert start.installed.sockets == {}


def test_a_socket_that_an_adopted_flow_holds_is_no_port_forward() -> None:
    socket = socket_of(udp(1))
    start = Start(NetworkState(flows={udp(1): AP2}, sockets={socket: AP2}))
    start.do()
    assert start.engine.sessions[LAN].table(AP2).keys() == {udp(1)}
    assert start.installed.sockets == {socket: AP2}


def test_nothing_is_installed_before_what_is_there_is_known() -> None:
    # One peer has the flow, and another one's lower id the socket.
    state = NetworkState(flows={udp(1): AP3}, sockets={socket_of(udp(1)): AP2})
    start = Start(state)
    start.do()
    assert start.reconciler.repairs == 0
    assert start.installed == state
    assert start.path.kernel.applied in ([], [{}])


def test_a_client_that_the_bridge_no_longer_knows_is_released_at_sync() -> None:
    start = Start(NetworkState(neighbours={ANN_IP: ANN, BEN_IP: BEN}))
    start.clients.see(LAN, BEN)
    start.do()
    said = in_sync(start)
    assert [claim.released for claim in said if claim.mac == ANN] == [True]
    assert [claim.released for claim in said if claim.mac == BEN] == [False]


def test_nor_does_one_stay_whose_ageing_was_lost() -> None:
    start = Start(NetworkState())
    start.clients.see(LAN, BEN)

    def lose(_: Agent) -> None:
        in_sync(start)
        start.shell.run([ClientSeen(LAN, ANN, Source.FDB)])
        start.clients.lose_events()

    start.do(lose, lambda agent: agent._read_clients())
    left = {client.claim.mac for client in start.engine.clients[LAN]}
    assert left == {BEN}


def refuse_once(monitor: FakeFlowMonitor | FakeClientMonitor) -> Callable[[], object]:
    """A monitor's `dump` that the kernel refuses the first time."""
    there = monitor.dump
    answers = iter([KernelFault("the table changed while it was read", errno.EINTR)])

    def dump() -> object:
        for fault in answers:
            raise fault
        return there()

    return dump


def test_a_table_that_is_not_told_after_a_loss_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(agent_module, "RELIST_S", 0.0)
    start = Start(NetworkState())

    def lose(_: Agent) -> None:
        in_sync(start)
        start.flows.tables[LAN] = {udp(1): NAT}
        start.clients.see(LAN, BEN)
        start.clients.read()
        for monitor in (start.flows, start.clients):
            monkeypatch.setattr(monitor, "dump", refuse_once(monitor))
            monitor.lose_events()

    def nothing(_: Agent) -> None:
        """Let the loop turn."""

    start.do(lose, lambda agent: agent._read_flows(), lambda agent: agent._read_clients(), nothing)
    assert start.engine.sessions[LAN].table(AP1).keys() == {udp(1)}
    assert [client.claim.mac for client in start.engine.clients[LAN]] == [BEN]


def test_a_flow_of_ours_is_no_peers() -> None:
    state = NetworkState(flows={udp(1): AP2})
    start = Start(state)
    start.flows.open_flow(LAN, udp(1), NAT)
    start.do()
    assert start.installed.flows == {}
