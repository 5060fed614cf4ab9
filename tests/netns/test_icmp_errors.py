"""ICMP errors about a flow that is tunnelled reach whom they concern, speaking of what he knows."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

import pytest

from apagent.lab import namespaces
from apagent.lab.lab import Lab
from tests.netns.conftest import MakeLab
from tests.netns.observe import SERVER, ask, eventually, uplink
from tests.netns.packets import (
    FRAGMENTATION_NEEDED,
    GATEWAY,
    HEADERS,
    IP_PMTUDISC_DO,
    PORT_UNREACHABLE,
    ROUTER,
    TIME_EXCEEDED,
    UNREACHABLE,
    Ends,
    Error,
    Quotation,
    error_of,
    icmp_errors,
    link_mtu,
    roam,
    udp_flow,
)

pytestmark = pytest.mark.netns

HOPS_TO_ROUTER = 3
"""Serving AP, anchor, router."""
LOW_MTU = 1300


@pytest.fixture(scope="module")
def domain(module_lab: MakeLab) -> Lab:
    lab = module_lab(aps=2, clients=1)
    for node in lab.nodes:
        with namespaces.inside(lab.namespace(node)):
            namespaces.set_sysctl("ipv4/icmp_ratelimit", 0)
    return lab


@pytest.fixture
def roamed(domain: Lab) -> Iterator[Ends]:
    """A UDP flow anchored at ap1, whose client is at ap2 now."""
    roam(domain, "client1", "ap1")
    with udp_flow(domain) as ends:
        roam(domain, "client1", "ap2")
        ends.exchange()
        yield ends


def test_the_server_has_closed_its_socket(roamed: Ends) -> None:
    roamed.server.close()
    roamed.client.send(b"anybody there?")
    assert error_of(roamed.client) == Error(SERVER, UNREACHABLE, PORT_UNREACHABLE, 0)
    roamed.client.send(b"and now?")
    eventually(lambda: _pending(roamed.client) == errno.ECONNREFUSED)


UDP_PROBE = ("-U", "--sport=5353", "-p", "7777")
ECHO_PROBE = ("-I",)


@pytest.mark.parametrize("probe", [("-U",), ECHO_PROBE], ids=["udp", "echo"])
def test_traceroute_shows_every_hop_of_a_new_flow(domain: Lab, probe: tuple[str, ...]) -> None:
    roam(domain, "client1", "ap1")
    roam(domain, "client1", "ap2")
    assert hops(domain, *probe) == [GATEWAY, ROUTER, SERVER]


@pytest.mark.parametrize("probe", [UDP_PROBE, ECHO_PROBE], ids=["udp", "echo"])
def test_traceroute_shows_every_hop_of_a_flow_anchored_elsewhere(
    domain: Lab, probe: tuple[str, ...]
) -> None:
    roam(domain, "client1", "ap1")
    for ap in domain.aps:
        domain.run(ap, ["conntrack", "-F"])
    eventually(lambda: not ask(domain, "ap2", "flows"))
    assert hops(domain, *probe) == [GATEWAY, ROUTER, SERVER]
    eventually(lambda: ask(domain, "ap2", "flows"))
    roam(domain, "client1", "ap2")
    anchor = ask(domain, "ap1", "status")["tunnel_address"]
    assert hops(domain, *probe) == [GATEWAY, anchor, ROUTER, SERVER]


def hops(lab: Lab, *options: str) -> list[str]:
    """The addresses of the hops to the server; an asterisk for one that doesn't answer.

    In a namespace of its own for processes, traceroute has the same process id every time, which is
    its echoes' identifier.
    """
    argv = ["unshare", "--pid", "--fork", "traceroute", "-n", "-q1", "-N1", "-w2", *options, SERVER]
    lines = lab.run("client1", argv).stdout.splitlines()[1:]
    return [line.split()[1] for line in lines]


def test_the_client_has_closed_its_socket(domain: Lab, roamed: Ends) -> None:
    outside = roamed.outside
    with icmp_errors(domain, "server") as errors:
        roamed.client.close()
        roamed.server.send(b"anybody there?")
        assert error_of(roamed.server) == Error(uplink("ap1"), UNREACHABLE, PORT_UNREACHABLE, 0)
        wanted = Quotation(uplink("ap1"), UNREACHABLE, PORT_UNREACHABLE, 0, outside, True)
        assert errors() == [wanted]


@pytest.mark.parametrize(
    ("ttl", "offender"), [(1, GATEWAY), (HOPS_TO_ROUTER, ROUTER)], ids=["serving-ap", "router"]
)
def test_the_clients_packet_lives_too_short(
    domain: Lab, roamed: Ends, ttl: int, offender: str
) -> None:
    with icmp_errors(domain, "client1") as errors:
        roamed.client.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
        roamed.client.send(b"not far")
        assert error_of(roamed.client) == Error(offender, TIME_EXCEEDED, 0, 0)
        wanted = Quotation(offender, TIME_EXCEEDED, 0, 0, roamed.inside, True)
        assert errors() == [wanted]


@pytest.mark.parametrize("ttl", [2, 3], ids=["anchor", "serving-ap"])
def test_the_servers_packet_lives_too_short(domain: Lab, roamed: Ends, ttl: int) -> None:
    with icmp_errors(domain, "server") as errors:
        roamed.server.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
        roamed.server.send(b"not far")
        assert error_of(roamed.server) == Error(uplink("ap1"), TIME_EXCEEDED, 0, 0)
        wanted = Quotation(uplink("ap1"), TIME_EXCEEDED, 0, 0, roamed.outside, True)
        assert errors() == [wanted]


def test_the_path_behind_the_anchor_is_narrow(domain: Lab, roamed: Ends) -> None:
    roamed.discover_mtu(IP_PMTUDISC_DO)
    with link_mtu(domain, "internet", "srv", LOW_MTU), icmp_errors(domain, "client1") as errors:
        roamed.client.send(bytes(LOW_MTU - HEADERS + 1))
        assert error_of(roamed.client) == Error(ROUTER, UNREACHABLE, FRAGMENTATION_NEEDED, LOW_MTU)
        wanted = Quotation(ROUTER, UNREACHABLE, FRAGMENTATION_NEEDED, LOW_MTU, roamed.inside, True)
        assert errors() == [wanted]
        roamed.exchange(LOW_MTU - HEADERS)


def _pending(end: socket.socket) -> int:
    return end.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
