"""With takeover a session says whether its flow is established; what conntrack reports for that."""

from __future__ import annotations

import select
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from ipaddress import IPv4Address

import pytest

from apagent.core.domain import Domain
from apagent.core.model import TCP, UDP, FlowKey, Nat, Translation
from apagent.kernel.conntrack import LinuxFlowMonitor
from apagent.kernel.conntrack_filter import wanted_events
from apagent.kernel.nft import NftTable
from apagent.kernel.wire import Netlink, split
from tests.contract.conftest import run
from tests.contract.flow_support import routed
from tests.domains import LAN, domain, lan, takeover

pytestmark = pytest.mark.netns

WITH_TAKEOVER, WITHOUT = domain(networks=(takeover(),)), domain()
NEW, DELETE, FRESH = 0x100, 0x102, 0x400
NO_CLIENT = IPv4Address("10.78.0.1")


class Counted:
    """What conntrack tells everybody who listens."""

    def __init__(self, program: bytes = b"") -> None:
        self._netlink = Netlink(12, (1, 2, 3), program=program)
        self._buffer = bytearray(1 << 16)
        self.close = self._netlink.close

    def events(self) -> list[str]:
        found = []
        while size := self._netlink.events(self._buffer):
            for type_, flags, _, _ in split(bytes(self._buffer[:size])):
                kind = "new" if flags & FRESH else "updated"
                found.append("ended" if type_ == DELETE else kind)
        return found


class Kernel:
    """A router with the agent's table, a monitor, and somebody else who listens."""

    def __init__(self, stack: ExitStack, domain_: Domain) -> None:
        self.router = stack.enter_context(routed())
        table = stack.enter_context(closing(NftTable()))
        table.prepare(domain_)
        table.release_hold(domain_)
        self.monitor = stack.enter_context(closing(LinuxFlowMonitor(domain_.networks)))
        self.others = stack.enter_context(closing(Counted()))

    def changes(self) -> dict[FlowKey, Nat | None]:
        """Of the only network, since the last call."""
        batches = self.monitor.read()
        return {key: nat for batch in batches for key, nat in batch.changes.items()}


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def is_established(nat: Nat | None) -> bool:
    assert nat is not None
    return Translation.of(nat).established


def test_a_connection_is_reported_when_it_opens_is_established_and_ends(stack: ExitStack) -> None:
    kernel = Kernel(stack, WITH_TAKEOVER)
    flow = kernel.router.open(TCP, 4242)
    assert kernel.others.events() == ["new", "updated"]
    assert {key: is_established(nat) for key, nat in kernel.changes().items()} == {flow: True}
    assert is_established(kernel.monitor.dump()[LAN][flow])
    kernel.router.hang_up(flow)
    assert kernel.others.events() == []
    kernel.router.close(flow)
    assert kernel.others.events() == ["ended"]
    assert kernel.changes() == {flow: None}


def test_without_takeover_nothing_is_different(stack: ExitStack) -> None:
    kernel = Kernel(stack, WITHOUT)
    flow = kernel.router.open(TCP, 4242)
    assert kernel.others.events() == ["new", "updated", "updated"]
    assert {key: is_established(nat) for key, nat in kernel.changes().items()} == {flow: False}
    assert not is_established(kernel.monitor.dump()[LAN][flow])
    kernel.router.hang_up(flow)
    assert "updated" in kernel.others.events()
    assert not select.select([kernel.monitor], [], [], 0)[0]


def test_datagrams_to_and_fro_for_two_seconds_are_an_established_flow(stack: ExitStack) -> None:
    """So the kernel sees it (nf_conntrack_udp_packet(), nf_conntrack_proto_udp.c)."""
    kernel = Kernel(stack, WITH_TAKEOVER)
    flow = kernel.router.open(UDP, 4242)
    assert {key: is_established(nat) for key, nat in kernel.changes().items()} == {flow: False}
    kernel.router.answer(flow)
    time.sleep(2.1)
    kernel.router.answer(flow)
    assert {key: is_established(nat) for key, nat in kernel.changes().items()} == {flow: True}
    assert kernel.others.events() == ["new", "updated"]


def test_a_flow_to_a_forwarded_port_is_reported_as_little(stack: ExitStack) -> None:
    kernel = Kernel(stack, WITH_TAKEOVER)
    flow = kernel.router.call(4242)
    assert not is_established(kernel.changes()[flow])
    assert kernel.others.events() == ["new"]


def test_updates_of_others_flows_do_not_wake_us(stack: ExitStack) -> None:
    kernel = Kernel(stack, WITH_TAKEOVER)
    ours = stack.enter_context(closing(Counted(wanted_events([lan().prefix], [lan().prefix]))))
    run("ip", "route", "add", "10.78.0.0/16", "dev", "br-lan")
    other = kernel.router.open(TCP, 4242, client=NO_CLIENT)
    assert kernel.others.events() == ["new", "updated", "updated"]
    kernel.router.close(other)
    assert ours.events() == []
    kernel.router.open(TCP, 4243)
    assert ours.events() == ["new", "updated"]


def test_an_adopted_flow_says_it_at_once(stack: ExitStack) -> None:
    kernel = Kernel(stack, WITH_TAKEOVER)
    flow = kernel.router.open(UDP, 4242)
    nat = Translation(IPv4Address("203.0.113.22"), 4242, established=True).packed
    kernel.changes()
    kernel.monitor.adopt(LAN, {flow: nat})
    assert kernel.changes() == {flow: nat}
    assert kernel.monitor.dump()[LAN] == {flow: nat}
