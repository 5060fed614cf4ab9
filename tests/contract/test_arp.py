"""What clients are told by ARP when one of them comes or goes, and what they make of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from ipaddress import IPv4Address

import pytest

from apagent.core.model import Mac
from apagent.errors import KernelFault
from apagent.kernel.linux import LinuxDataPath
from tests.contract import packets
from tests.contract.conftest import GATEWAY_MAC, AccessPoint, run
from tests.contract.flow_support import namespace, run_inside
from tests.contract.packets import BROADCAST, Arp, Wire, eventually
from tests.domains import ANN, ANN_IP, BEN, BEN_IP, LAN, domain, lan

pytestmark = pytest.mark.netns

DOMAIN = domain()
ISOLATED = replace(DOMAIN, networks=(replace(lan(), isolate_clients=True),))
GATEWAY = lan().gateway
CAY_IP, DAN_IP = ANN_IP + 7, ANN_IP + 8
NOBODY = Mac("00:00:00:00:00:00")
REQUEST, REPLY = 1, 2
_TICK_S = 0.02
"""Longer than a tick of any kernel (100 Hz)."""


@pytest.fixture
def path(access_point: AccessPoint) -> Iterator[LinuxDataPath]:
    path = LinuxDataPath()
    path.prepare(DOMAIN)
    yield path
    path.close()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def ann(access_point: AccessPoint, stack: ExitStack) -> Wire:
    """What Ann receives; the bridge knows where she is."""
    access_point.send_hello(ANN, port=0)
    return stack.enter_context(packets.wire("client1"))


@pytest.fixture
def ben(access_point: AccessPoint, stack: ExitStack) -> Wire:
    """What Ben receives."""
    access_point.send_hello(BEN, port=1)
    return stack.enter_context(packets.wire("client2"))


def until_goodbye(path: LinuxDataPath, wire: Wire) -> list[Arp]:
    """What is on the wire before the announcement that we make now."""
    path.prepare(DOMAIN)
    path.forget_client(LAN, BEN, [CAY_IP])
    return wire.arps_until(lambda arp: arp.sender_address == CAY_IP)[:-1]


def told(address: IPv4Address) -> Arp:
    """We tell Ann that `address` is to be found at the gateway's MAC."""
    return Arp(ANN, REPLY, GATEWAY_MAC, address, ANN, ANN_IP)


def test_a_client_that_comes_is_told_what_is_behind_us(
    path: LinuxDataPath, ann: Wire, ben: Wire
) -> None:
    path.welcome_client(LAN, ANN, [ANN_IP], [BEN_IP])
    assert until_goodbye(path, ann) == [told(GATEWAY), told(BEN_IP)]
    assert until_goodbye(path, ben) == []


def test_an_isolated_client_is_told_of_the_gateway_alone(path: LinuxDataPath, ann: Wire) -> None:
    path.prepare(ISOLATED)
    path.welcome_client(LAN, ANN, [ANN_IP], [BEN_IP])
    assert until_goodbye(path, ann) == [told(GATEWAY)]


def test_when_a_client_has_left_all_are_told_where_it_is(path: LinuxDataPath, ann: Wire) -> None:
    path.forget_client(LAN, BEN, [BEN_IP, DAN_IP])
    assert until_goodbye(path, ann) == [
        Arp(BROADCAST, REQUEST, GATEWAY_MAC, address, NOBODY, address)
        for address in (BEN_IP, DAN_IP)
    ]


def test_isolated_clients_are_not_told_of_each_other(path: LinuxDataPath, ann: Wire) -> None:
    path.prepare(ISOLATED)
    path.forget_client(LAN, BEN, [BEN_IP])
    assert until_goodbye(path, ann) == []


def test_a_client_is_asked_whether_it_is_here(path: LinuxDataPath, ann: Wire, ben: Wire) -> None:
    path.ask_client(LAN, ANN, [ANN_IP, DAN_IP])
    assert until_goodbye(path, ann) == [
        Arp(ANN, REQUEST, GATEWAY_MAC, GATEWAY, NOBODY, address) for address in (ANN_IP, DAN_IP)
    ]
    assert until_goodbye(path, ben) == []


def test_a_client_interface_that_is_gone_or_new(path: LinuxDataPath, stack: ExitStack) -> None:
    path.welcome_client(LAN, ANN, [ANN_IP], [])
    run("ip", "link", "del", "br-lan")
    with pytest.raises(KernelFault, match="br-lan"):
        path.welcome_client(LAN, ANN, [ANN_IP], [])
    new = Mac("02:00:00:00:00:02")
    run("ip", "link", "add", "br-lan", "address", new, "type", "bridge")
    run("ip", "link", "set", "port1", "master", "br-lan")
    run("ip", "link", "set", "br-lan", "up")
    client = stack.enter_context(packets.wire("client1"))
    path.welcome_client(LAN, ANN, [ANN_IP], [])
    assert client.arps_until(lambda arp: True) == [told(GATEWAY)._replace(sender=new)]


class Client:
    """A real client at the first port, whose kernel keeps a neighbour table."""

    def __init__(self, stack: ExitStack) -> None:
        self._pid = namespace(stack)
        run("ip", "link", "set", "client1", "netns", str(self._pid))
        self._run("ip", "link", "set", "client1", "address", ANN, "arp", "on", "up")
        self._run("ip", "address", "add", f"{ANN_IP}/16", "dev", "client1")
        # A kernel ignores what it is told of an entry within a second of its last change,
        # or, with 0, in the tick of its last change (arp_process, net/ipv4/arp.c).
        self._run("sysctl", "-qw", "net.ipv4.neigh.client1.locktime=0")

    def neighbour(self, address: IPv4Address) -> str:
        return self._run("ip", "neighbour", "show", str(address))

    def remember(self, address: IPv4Address, mac: str) -> None:
        entry = f"{address} lladdr {mac} dev client1 nud stale"
        self._run("ip", "neighbour", "replace", *entry.split())
        time.sleep(_TICK_S)

    def ask(self, address: IPv4Address) -> None:
        """Send a datagram, and look for its receiver by ARP."""
        argv = ("bash", "-c", f"echo > /dev/udp/{address}/9")
        self._run(*argv)

    def _run(self, *argv: str) -> str:
        return run_inside(self._pid, *argv)


@pytest.fixture
def client(access_point: AccessPoint, stack: ExitStack) -> Client:
    return Client(stack)


def test_a_client_that_looks_for_the_gateway_in_vain_is_helped(
    path: LinuxDataPath, client: Client
) -> None:
    """Its request was lost while it changed APs, and it would repeat it after a second."""
    run("ip", "link", "set", "br-lan", "arp", "off")
    client.ask(GATEWAY)
    assert "INCOMPLETE" in client.neighbour(GATEWAY)
    path.welcome_client(LAN, ANN, [ANN_IP], [])
    assert eventually(lambda: f"lladdr {GATEWAY_MAC} REACHABLE" in client.neighbour(GATEWAY))


def test_a_client_that_comes_learns_that_a_former_neighbour_is_behind_us(
    path: LinuxDataPath, client: Client
) -> None:
    client.remember(BEN_IP, BEN)
    path.welcome_client(LAN, ANN, [ANN_IP], [BEN_IP])
    assert eventually(lambda: f"lladdr {GATEWAY_MAC}" in client.neighbour(BEN_IP))


def test_a_client_that_stays_learns_that_a_neighbour_has_left(
    path: LinuxDataPath, client: Client
) -> None:
    client.remember(BEN_IP, BEN)
    path.forget_client(LAN, BEN, [BEN_IP])
    assert eventually(lambda: f"lladdr {GATEWAY_MAC}" in client.neighbour(BEN_IP))
