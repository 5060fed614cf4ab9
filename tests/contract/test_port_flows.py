"""Both readers of conntrack events agree on every message that this kernel sends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from apagent.core.model import ICMP, TCP, UDP
from apagent.kernel.conntrack import FlowParser
from apagent.kernel.port_flows import Changes
from apagent.kernel.wire import Netlink, split
from tests.contract.flow_support import FORWARDED, OTHER_CLIENT, Router, routed
from tests.domains import LAN, lan
from tests.unit.test_port_flows import DELETE, read

_NETLINK_NETFILTER = 12
_GROUPS = (1, 2, 3)
"""NFNLGRP_CONNTRACK_NEW, _UPDATE and _DESTROY."""


@pytest.fixture
def router() -> Iterator[Router]:
    with routed() as made:
        yield made


@pytest.fixture
def events(router: Router) -> Iterator[Netlink]:
    """Everything that conntrack reports."""
    with closing(Netlink(_NETLINK_NETFILTER, groups=_GROUPS)) as netlink:
        yield netlink


def messages(events: Netlink) -> Iterator[bytes]:
    buffer = bytearray(1 << 16)
    while size := events.events(buffer):
        yield bytes(buffer[:size])


@pytest.mark.netns
def test_on_flows_of_every_kind_from_birth_to_end(router: Router, events: Netlink) -> None:
    flows = [
        router.open(TCP, 6001),
        router.open(UDP, 6002),
        router.open(UDP, 6003, OTHER_CLIENT, FORWARDED),
        router.open(ICMP, 604),
    ]
    router.call(6005)
    for flow in flows:
        router.close(flow)
    fast = total = 0
    for datagram in messages(events):
        [(type_, _, _, body)] = split(datagram)
        changes, left = read([datagram], (lan(),))
        parsed = FlowParser([lan()]).parse(body)
        expected: Changes = {}
        if parsed is not None:
            expected[parsed.key] = None if type_ == DELETE else parsed.nat
        total += 1
        if not left:
            fast += 1
            assert changes == {LAN: expected}
    assert total >= 2 * len(flows)
    assert fast >= 6
