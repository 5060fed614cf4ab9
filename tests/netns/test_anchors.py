"""Where flows are anchored, and what is left of them when they end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from apagent.lab import namespaces
from apagent.lab.lab import Lab
from tests.netns.conftest import MakeLab
from tests.netns.observe import (
    SERVER,
    address,
    agreed,
    becomes,
    elements,
    eventually,
    host_routes,
    nearby,
    served_by,
    sessions,
    tracked,
    uplink,
)
from tests.netns.sockets import Connection, ask_source, connection, udp_socket

pytestmark = pytest.mark.netns

GONE_S = 8.0
"""How long an ended flow's session may stay, its conntrack timeout not counted: tables of 262,144
buckets are looked through every five seconds (COLLECT_SHARE)."""
CONNTRACK_TIMEOUT_S = 1
_TIMEOUTS = ("tcp_timeout_time_wait", "tcp_timeout_close", "tcp_timeout_last_ack", "icmp_timeout")
_UDP_TIMEOUTS = ("udp_timeout", "udp_timeout_stream")


@pytest.fixture(scope="module")
def domain(module_lab: MakeLab) -> Lab:
    made = module_lab(aps=3, clients=1)
    _set_timeouts(made, _TIMEOUTS)
    return made


@pytest.fixture(autouse=True)
def _at_ap1_without_flows(domain: Lab) -> None:
    domain.roam("client1", "ap1")
    served_by(domain, "client1", "ap1")
    _set_timeouts(domain, _UDP_TIMEOUTS, 30)
    for ap in domain.aps:
        domain.run(ap, ["conntrack", "-F"])
    becomes(lambda: [sessions(domain, ap) for ap in domain.aps], [set()] * len(domain.aps))
    agreed(domain)


def _set_timeouts(lab: Lab, names: tuple[str, ...], value: int = CONNTRACK_TIMEOUT_S) -> None:
    for ap in lab.aps:
        with namespaces.inside(lab.namespace(ap)):
            for name in names:
                namespaces.set_sysctl(f"netfilter/nf_conntrack_{name}", value)


def roam(lab: Lab, ap: str) -> None:
    agreed(lab)
    lab.roam("client1", ap)
    served_by(lab, "client1", ap)


@contextlib.contextmanager
def three_connections(lab: Lab) -> Iterator[list[Connection]]:
    """One anchored at each AP; the client ends at the last one."""
    with contextlib.ExitStack() as stack:
        opened = []
        for ap in lab.aps:
            roam(lab, ap)
            opened.append(stack.enter_context(connection(lab, "client1")))
        agreed(lab)
        yield opened


def test_new_connections_use_the_new_ap_and_old_ones_stay(domain: Lab) -> None:
    with three_connections(domain) as connections:
        assert [opened.source for opened in connections] == [uplink(ap) for ap in domain.aps]
        for ap in domain.aps:
            roam(domain, ap)
            for opened in connections:
                opened.exchange(b"still there\n")
        assert sorted(s.anchor for s in agreed(domain)) == list(domain.aps)


def test_a_udp_socket_keeps_its_address_also_towards_new_servers(domain: Lab) -> None:
    with (
        udp_socket(domain, "server", SERVER) as one,
        udp_socket(domain, "server", SERVER) as other,
        udp_socket(domain, "client1") as old,
        udp_socket(domain, "client1") as new,
    ):
        assert ask_source(old, one) == uplink("ap1")
        roam(domain, "ap2")
        assert ask_source(old, one) == uplink("ap1")
        assert ask_source(old, other) == uplink("ap1")  # RFC 4787, section 4.1
        assert ask_source(new, one) == uplink("ap2")


def test_an_ended_flow_is_gone_everywhere(domain: Lab) -> None:
    with three_connections(domain) as connections:
        for ap, opened in zip(domain.aps, connections, strict=True):
            opened.client.close()
            opened.server.close()
            _assert_gone(domain, ap)


def test_a_silent_udp_socket_and_a_ping_are_gone_everywhere(domain: Lab) -> None:
    roam(domain, "ap2")
    with udp_socket(domain, "server", SERVER) as server, udp_socket(domain, "client1") as client:
        _set_timeouts(domain, _UDP_TIMEOUTS)
        domain.run("client1", ["ping", "-c1", "-W2", SERVER])
        assert ask_source(client, server) == uplink("ap2")
        eventually(lambda: {s.protocol for s in sessions(domain, "ap2")} >= {"udp", "icmp"})
        _assert_gone(domain, "ap2")


def _assert_gone(lab: Lab, anchor: str) -> None:
    becomes(
        lambda: {ap: sessions(lab, ap, "--anchor", anchor) for ap in lab.aps},
        {ap: set() for ap in lab.aps},
        CONNTRACK_TIMEOUT_S + GONE_S,
    )
    agreed(lab)


def test_nothing_but_a_host_route_is_left_at_an_anchor(domain: Lab) -> None:
    me = address(domain, "client1")
    _set_timeouts(domain, _UDP_TIMEOUTS)
    with connection(domain, "client1"), udp_socket(domain, "client1") as udp:
        udp.sendto(b"one way", (SERVER, 9))
        roam(domain, "ap2")
        served_by(domain, "client1", "ap2")
        assert len(tracked(domain, "ap1", "client1")) >= 1
        assert host_routes(domain, "ap1") == {me}
    _assert_gone(domain, "ap1")
    assert tracked(domain, "ap1", "client1") == []
    assert host_routes(domain, "ap1") == {me}
    assert not any(entry.startswith(me) for entry in nearby(domain, "ap1"))
    for ap in domain.aps:
        maps = {
            name: elements(domain, ap, f"lan_{name}") for name in ("flows", "echoes", "sockets")
        }
        assert maps == {"flows": [], "echoes": [], "sockets": []}
