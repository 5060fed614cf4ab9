"""The filter of conntrack events on the real kernel: who is woken by what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from ipaddress import IPv4Network

import pytest

from apagent.core.model import ICMP, TCP, UDP, FlowKey
from apagent.kernel.conntrack import FlowParser
from apagent.kernel.conntrack_filter import wanted_events
from apagent.kernel.wire import Netlink, split
from tests.contract.flow_support import Router, routed
from tests.domains import lan

_NETLINK_NETFILTER = 12
_GROUPS = (1, 2, 3)
"""NFNLGRP_CONNTRACK_NEW, _UPDATE and _DESTROY."""
OURS, ELSEWHERE = IPv4Network("10.77.0.0/16"), IPv4Network("10.79.0.0/16")

Heard = Callable[[], list[FlowKey]]


@pytest.fixture
def router() -> Iterator[Router]:
    with routed() as made:
        yield made


@pytest.fixture
def listen(router: Router) -> Iterator[Callable[..., Heard]]:
    """Subscribes with a filter; what it returns tells the flows of all events that came."""
    with ExitStack() as stack:

        def listen_(prefix: IPv4Network, *updates: IPv4Network) -> Heard:
            program = wanted_events([prefix], updates)
            socket = stack.enter_context(
                closing(Netlink(_NETLINK_NETFILTER, _GROUPS, program=program))
            )
            return lambda: list(_flows(socket))

        yield listen_


def _flows(socket: Netlink) -> Iterator[FlowKey]:
    buffer = bytearray(1 << 16)
    parser = FlowParser([lan()])
    while size := socket.events(buffer):
        for _, _, _, body in split(bytes(buffer[:size])):
            flow = parser.parse(body)
            if flow is not None:
                yield flow.key


@pytest.mark.netns
def test_flows_of_our_clients_are_heard_from_birth_to_end(
    router: Router, listen: Callable[..., Heard]
) -> None:
    heard = listen(OURS)
    flows = [router.open(TCP, 7001), router.open(UDP, 7002), router.open(ICMP, 703)]
    for flow in flows:
        router.close(flow)
    assert sorted(heard()) == sorted([*flows, *flows])


@pytest.mark.netns
def test_a_flow_that_is_forwarded_to_a_client_is_heard(
    router: Router, listen: Callable[..., Heard]
) -> None:
    heard = listen(OURS)
    flow = router.call(7004)
    assert heard() == [flow]


@pytest.mark.netns
def test_flows_of_others_wake_nobody(router: Router, listen: Callable[..., Heard]) -> None:
    heard = listen(ELSEWHERE)
    router.close(router.open(TCP, 7005))
    router.close(router.open(UDP, 7006))
    router.call(7007)
    assert heard() == []


@pytest.mark.netns
def test_updates_are_heard_where_they_are_wanted(
    router: Router, listen: Callable[..., Heard]
) -> None:
    without, with_updates = listen(OURS), listen(OURS, OURS)
    flow = router.open(TCP, 7008)
    assert without() == [flow]
    assert len(with_updates()) > 1


@pytest.mark.netns
def test_so_are_updates_of_a_forwarded_flow(router: Router, listen: Callable[..., Heard]) -> None:
    without, with_updates, others = listen(OURS), listen(OURS, OURS), listen(OURS, ELSEWHERE)
    flow = router.call(7009, answer=True)
    assert without() == others() == [flow]
    assert len(with_updates()) > 1
