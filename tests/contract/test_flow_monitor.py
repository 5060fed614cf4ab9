"""The contract of a `FlowMonitor`, kept by the fake and by the real kernel with real traffic."""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from ipaddress import IPv4Address
from typing import Protocol

import pytest

from apagent.core.model import ICMP, TCP, UDP, Flow, FlowKey, Nat, Sessions, Translation
from apagent.errors import EventsLost
from apagent.kernel import conntrack
from apagent.kernel.conntrack import LinuxFlowMonitor
from apagent.kernel.port import FlowMonitor
from tests.contract.conftest import run
from tests.contract.flow_support import (
    CALLED_PORT,
    CLIENT,
    FORWARDED,
    OTHER_CLIENT,
    OUTSIDE,
    SERVER,
    Router,
    routed,
)
from tests.domains import LAN, lan
from tests.fakes.kernel import FakeFlowMonitor

Connect = Callable[[], LinuxFlowMonitor]

NETWORKS = (lan(), lan("zoo", "10.79.0.0/16"))


class Kernel(Protocol):
    """What makes flows, and the monitor that watches it."""

    @property
    def monitor(self) -> FlowMonitor: ...

    def open(self, protocol: int, port: int) -> FlowKey: ...

    def close(self, flow: FlowKey) -> None: ...

    def expire(self, flow: FlowKey) -> None: ...

    def overflow(self) -> None:
        """Lose events, of flows that are all open."""


class Fake:
    def __init__(self) -> None:
        self.monitor = FakeFlowMonitor()

    def open(self, protocol: int, port: int) -> FlowKey:
        flow = Flow(protocol, CLIENT, port, SERVER, {ICMP: 0, TCP: 80, UDP: 53}[protocol]).key
        self.monitor.open_flow(LAN, flow, translated(port))
        return flow

    def close(self, flow: FlowKey) -> None:
        self.monitor.close_flow(LAN, flow)

    def expire(self, flow: FlowKey) -> None:
        self.monitor.expire_flow(LAN, flow)

    def overflow(self) -> None:
        self.open(UDP, 7000)
        self.monitor.lose_events()


class Real:
    def __init__(self, router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
        self._router = router
        self._monkeypatch = monkeypatch
        self.monitor = LinuxFlowMonitor(NETWORKS)
        self.open = router.open
        self.close = router.close
        self.expire = router.expire

    def overflow(self) -> None:
        self._monkeypatch.setattr(conntrack, "WANTED_BUFFER", 4096)
        self.monitor.close()
        self.monitor = LinuxFlowMonitor(NETWORKS)
        for port in range(7000, 7040):
            self.open(UDP, port)


@pytest.fixture
def router() -> Iterator[Router]:
    with routed() as router:
        yield router


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.netns)])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    kernel: Kernel = Fake()
    if request.param == "real":
        kernel = Real(request.getfixturevalue("router"), monkeypatch)
    yield kernel
    kernel.monitor.close()


@pytest.fixture
def connect(router: Router) -> Iterator[Connect]:
    """Starts a monitor of the router's flows."""
    with ExitStack() as stack:

        def connect_() -> LinuxFlowMonitor:
            return stack.enter_context(closing(LinuxFlowMonitor(NETWORKS)))

        yield connect_


@pytest.fixture
def monitor(connect: Connect) -> LinuxFlowMonitor:
    return connect()


def translated(port: int) -> Nat:
    """Masquerading keeps a port that is free."""
    return Translation(OUTSIDE, port).packed


def changed(monitor: FlowMonitor) -> dict[FlowKey, Nat | None]:
    """The only network's changes."""
    [batch] = monitor.read()
    assert batch.network == LAN
    return dict(batch.changes)


def readable(monitor: FlowMonitor) -> bool:
    return bool(select.select([monitor], [], [], 0)[0])


def sessions(monitor: FlowMonitor) -> Sessions:
    tables = monitor.dump()
    assert not any(table for name, table in tables.items() if name != LAN)
    return tables.get(LAN, {})


# Both kernels


def test_nothing_happens_to_an_idle_kernel(kernel: Kernel) -> None:
    assert not readable(kernel.monitor)
    assert kernel.monitor.read() == []
    assert sessions(kernel.monitor) == {}


@pytest.mark.parametrize("protocol", [TCP, UDP, ICMP])
def test_a_flow_opens_and_closes(kernel: Kernel, protocol: int) -> None:
    flow = kernel.open(protocol, 4242)
    assert readable(kernel.monitor)
    assert changed(kernel.monitor) == {flow: translated(4242)}
    assert sessions(kernel.monitor) == {flow: translated(4242)}
    kernel.close(flow)
    assert readable(kernel.monitor)
    assert changed(kernel.monitor) == {flow: None}
    assert sessions(kernel.monitor) == {}
    assert not readable(kernel.monitor)


def test_an_expired_flow_closes_when_it_is_collected(kernel: Kernel) -> None:
    expired, alive = kernel.open(UDP, 4242), kernel.open(UDP, 4243)
    kernel.monitor.read()
    kernel.expire(expired)
    kernel.monitor.collect_expired()
    kernel.monitor.collect_expired()
    assert changed(kernel.monitor) == {expired: None}
    assert sessions(kernel.monitor) == {alive: translated(4243)}


def test_a_batch_holds_the_net_effect(kernel: Kernel) -> None:
    gone, back, fresh = (kernel.open(UDP, port) for port in (5001, 5002, 5003))
    kernel.close(gone)
    kernel.close(back)
    assert kernel.open(UDP, 5002) == back
    assert changed(kernel.monitor) == {
        gone: None,
        back: translated(5002),
        fresh: translated(5003),
    }


@pytest.mark.parametrize("protocol", [TCP, UDP, ICMP])
def test_a_flow_is_ended(kernel: Kernel, protocol: int) -> None:
    ended, other = kernel.open(protocol, 4242), kernel.open(protocol, 4243)
    assert changed(kernel.monitor) == {ended: translated(4242), other: translated(4243)}
    kernel.monitor.end(LAN, [ended])
    assert readable(kernel.monitor)
    assert changed(kernel.monitor) == {ended: None}
    assert sessions(kernel.monitor) == {other: translated(4243)}


def test_flows_that_are_gone_already_may_be_ended(kernel: Kernel) -> None:
    flow = kernel.open(UDP, 4242)
    kernel.close(flow)
    kernel.monitor.end(LAN, [flow])
    alive = kernel.open(UDP, 4243)
    kernel.monitor.end(LAN, [flow, alive, flow])
    assert changed(kernel.monitor) == {flow: None, alive: None}
    kernel.monitor.end(LAN, [])
    assert not readable(kernel.monitor)


ELSEWHERE = Translation(IPv4Address("203.0.113.22"), 4242).packed
"""What another anchor made of a flow."""


@pytest.mark.parametrize("protocol", [TCP, UDP, ICMP])
def test_another_anchors_flow_is_adopted(kernel: Kernel, protocol: int) -> None:
    flow = Flow(protocol, CLIENT, 4242, SERVER, 0 if protocol == ICMP else 9).key
    kernel.monitor.adopt(LAN, {flow: ELSEWHERE})
    assert changed(kernel.monitor) == {flow: ELSEWHERE}
    assert sessions(kernel.monitor) == {flow: ELSEWHERE}
    kernel.monitor.end(LAN, [flow])
    assert changed(kernel.monitor) == {flow: None}


@pytest.mark.parametrize("protocol", [TCP, UDP, ICMP])
def test_an_entry_of_another_translation_gives_way(kernel: Kernel, protocol: int) -> None:
    flow = kernel.open(protocol, 4242)
    kernel.monitor.read()
    kernel.monitor.adopt(LAN, {flow: ELSEWHERE})
    assert changed(kernel.monitor) == {flow: ELSEWHERE}
    assert sessions(kernel.monitor) == {flow: ELSEWHERE}


def test_what_is_adopted_already_stays_as_it_is(kernel: Kernel) -> None:
    flow, new = (Flow(UDP, CLIENT, port, SERVER, 9).key for port in (4242, 4243))
    kernel.monitor.adopt(LAN, {flow: ELSEWHERE})
    kernel.monitor.read()
    kernel.monitor.adopt(LAN, {})
    kernel.monitor.adopt(LAN, {flow: ELSEWHERE})
    assert not readable(kernel.monitor)
    other = Translation(IPv4Address("203.0.113.22"), 9).packed
    kernel.monitor.adopt(LAN, {flow: ELSEWHERE, new: other})
    assert changed(kernel.monitor) == {new: other}


def test_thousands_are_adopted_in_one_call(kernel: Kernel) -> None:
    flows = {
        Flow(TCP, CLIENT, port, SERVER, 80).key: Translation(
            IPv4Address("203.0.113.22"), port, established=bool(port % 2)
        ).packed
        for port in range(20000, 23000)
    }
    kernel.monitor.adopt(LAN, flows)
    found = changed(kernel.monitor)
    assert {key: Translation.of(nat)[:2] for key, nat in found.items() if nat} == {
        key: Translation.of(nat)[:2] for key, nat in flows.items()
    }
    assert sessions(kernel.monitor).keys() == flows.keys()


def test_after_an_overflow_the_dump_tells_all(kernel: Kernel) -> None:
    kernel.overflow()
    with pytest.raises(EventsLost):
        kernel.monitor.read()
    assert kernel.monitor.read() == []
    assert Flow(UDP, CLIENT, 7000, SERVER, 53).key in sessions(kernel.monitor)
    flow = kernel.open(UDP, 6000)
    assert changed(kernel.monitor) == {flow: translated(6000)}


# The real one


@pytest.mark.netns
def test_a_port_that_is_taken_becomes_another(router: Router, monitor: LinuxFlowMonitor) -> None:
    first = router.open(UDP, 4242)
    second = router.open(UDP, 4242, client=OTHER_CLIENT)
    flows = changed(monitor)
    assert flows == {first: router.translation(first), second: router.translation(second)}
    assert flows[first] != flows[second]


@pytest.mark.netns
def test_two_pings_of_one_identifier_are_told_apart(
    router: Router, monitor: LinuxFlowMonitor
) -> None:
    first = router.open(ICMP, 4242)
    second = router.open(ICMP, 4242, client=OTHER_CLIENT)
    flows = changed(monitor)
    assert flows == {first: router.translation(first), second: router.translation(second)}
    assert flows[first] != flows[second]


@pytest.mark.netns
def test_the_key_is_what_the_client_sends(router: Router, monitor: LinuxFlowMonitor) -> None:
    """The destination is translated too, to an address and port that the client doesn't know."""
    run("ip", "neigh", "replace", str(FORWARDED), "lladdr", "02:00:00:00:00:01", "dev", "wan")
    flow = router.open(UDP, 4242, server=FORWARDED)
    assert changed(monitor) == {flow: translated(4242)}


@pytest.mark.netns
def test_a_flow_to_a_forwarded_port(router: Router, monitor: LinuxFlowMonitor) -> None:
    flow = router.call(4242)
    assert changed(monitor) == {flow: translated(CALLED_PORT)}
    assert sessions(monitor) == {flow: translated(CALLED_PORT)}
    monitor.end(LAN, [flow])
    assert changed(monitor) == {flow: None}
    assert sessions(monitor) == {}


@pytest.mark.netns
def test_flows_that_are_not_ours_are_left_out(router: Router, monitor: LinuxFlowMonitor) -> None:
    router.open(UDP, 4242, client=IPv4Address("10.78.0.1"))  # no network's client
    router.open(UDP, 4243, server=IPv4Address("10.77.0.1"))  # to the router: not translated
    assert readable(monitor)
    assert monitor.read() == []
    assert sessions(monitor) == {}


@pytest.mark.netns
def test_one_read_is_bounded(
    router: Router, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conntrack, "EVENTS_PER_BATCH", 2)
    monkeypatch.setattr(conntrack, "BATCHES_PER_READ", 1)
    monitor = connect()
    flows = [router.open(UDP, port) for port in (5001, 5002, 5003)]
    assert list(changed(monitor)) == flows[:2]
    assert readable(monitor)
    assert list(changed(monitor)) == flows[2:]


@pytest.mark.netns
def test_what_waits_from_before_an_overflow_is_thrown_away(
    router: Router, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an opening whose end was lost would be applied after the dump, and stay."""
    monkeypatch.setattr(conntrack, "WANTED_BUFFER", 4096)
    monitor = connect()
    flows = [router.open(UDP, port) for port in range(7000, 7040)]
    router.close(flows[0])
    with pytest.raises(EventsLost):
        monitor.read()
    assert monitor.read() == []
    assert sessions(monitor) == {flow: translated(Flow.of(flow).client_port) for flow in flows[1:]}


@pytest.mark.netns
def test_the_end_of_a_flow_that_is_older_than_the_monitor_is_reported(
    router: Router, connect: Connect
) -> None:
    """With the sysctl at 1; at 2 it takes that somebody, in any namespace, listened already."""
    run("sysctl", "-qw", "net.netfilter.nf_conntrack_events=1")
    flow = router.open(UDP, 4242)
    monitor = connect()
    router.close(flow)
    assert changed(monitor) == {flow: None}
