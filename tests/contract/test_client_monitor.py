"""The contract of a `ClientMonitor`, kept by the fake and by the real kernel."""

from __future__ import annotations

import select
from collections.abc import Iterator
from ipaddress import IPv4Address
from typing import Protocol

import pytest

from apagent.core.events import ClientAged, ClientSeen, Source
from apagent.core.model import Mac
from apagent.errors import EventsLost, KernelFault
from apagent.kernel.clients import LinuxClientMonitor
from apagent.kernel.linux import LinuxDataPath
from apagent.kernel.port import Change, ClientMonitor, NetworkDelta
from apagent.kernel.rtnetlink import AF_BRIDGE, NTF_MASTER, Neighbour, set_neighbour
from apagent.kernel.wire import Netlink
from tests.contract.conftest import AccessPoint, run
from tests.domains import ANN, ANN_IP, AP2, BEN, BEN_IP, LAN, domain
from tests.fakes.kernel import FakeClientMonitor

DOMAIN = domain()
ANSWER_MS = 2000

ANN_LEARNED = ClientSeen(LAN, ANN, Source.FDB)
ANN_RESOLVED = ClientSeen(LAN, ANN, Source.NEIGHBOUR, ANN_IP)


class World(Protocol):
    """What clients and bridge do, with a monitor that watches them."""

    monitor: ClientMonitor

    def speak(self, mac: Mac) -> None:
        """A client sends its first frame."""

    def ask(self, mac: Mac, address: IPv4Address) -> None:
        """A client that was never heard asks for the gateway's MAC."""

    def age(self, mac: Mac) -> None:
        """The bridge forgets a client."""

    def send(self, mac: Mac, address: IPv4Address) -> None:
        """A client that nobody has told us of sends a packet."""

    def overflow(self) -> None:
        """More happens than the monitor has room for."""

    def close(self) -> None:
        """The end."""


class FakeWorld:
    def __init__(self) -> None:
        self.fake = FakeClientMonitor()
        self.monitor: ClientMonitor = self.fake

    def speak(self, mac: Mac) -> None:
        self.fake.see(LAN, mac)

    def ask(self, mac: Mac, address: IPv4Address) -> None:
        self.fake.see(LAN, mac)
        self.fake.see(LAN, mac, Source.NEIGHBOUR, address)

    def age(self, mac: Mac) -> None:
        self.fake.age(LAN, mac)

    def send(self, mac: Mac, address: IPv4Address) -> None:
        self.fake.see(LAN, mac, Source.DATA, address)

    def overflow(self) -> None:
        self.fake.lose_events()

    def close(self) -> None:
        self.monitor.close()


class RealWorld:
    def __init__(self, access_point: AccessPoint) -> None:
        self.access_point = access_point
        self.path = LinuxDataPath()
        self.path.prepare(DOMAIN)
        self.monitor: ClientMonitor = LinuxClientMonitor(DOMAIN)

    def speak(self, mac: Mac) -> None:
        self.access_point.send_hello(mac)

    def ask(self, mac: Mac, address: IPv4Address) -> None:
        self.access_point.send_arp(mac, address)

    def age(self, mac: Mac) -> None:
        run("bridge", "fdb", "del", mac, "dev", "port1", "master")

    def send(self, mac: Mac, address: IPv4Address) -> None:
        self.access_point.send_udp(mac, address)

    def overflow(self) -> None:
        with_port = Neighbour(AF_BRIDGE, _index("port1"), b"", flags=NTF_MASTER)
        netlink = Netlink(0)
        macs = (b"\x02\x01" + number.to_bytes(4, "big") for number in range(20000))
        netlink.request(set_neighbour(with_port._replace(lladdr=m), "flood") for m in macs)
        netlink.close()

    def close(self) -> None:
        self.monitor.close()
        self.path.close()


def _index(device: str) -> int:
    return int(run("ip", "-o", "link", "show", device).split(":")[0])


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.netns)])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    world: World = (
        FakeWorld()
        if request.param == "fake"
        else RealWorld(request.getfixturevalue("access_point"))
    )
    yield world
    world.close()


@pytest.fixture
def real(access_point: AccessPoint) -> Iterator[RealWorld]:
    world = RealWorld(access_point)
    yield world
    world.close()


def events(monitor: ClientMonitor, count: int) -> list[ClientSeen | ClientAged]:
    """Wait for that many events."""
    found: list[ClientSeen | ClientAged] = []
    poll = select.poll()
    poll.register(monitor.fileno(), select.POLLIN)
    while len(found) < count and poll.poll(ANSWER_MS):
        found += monitor.read()
    return found


def readable(monitor: ClientMonitor) -> bool:
    return bool(select.select([monitor.fileno()], [], [], 0)[0])


def test_nothing_happened(world: World) -> None:
    assert world.monitor.read() == []
    assert world.monitor.dump() == []
    assert not readable(world.monitor)


def test_a_first_frame(world: World) -> None:
    world.speak(ANN)
    assert events(world.monitor, 1) == [ANN_LEARNED]
    assert world.monitor.dump() == [ANN_LEARNED]
    assert not readable(world.monitor)


def test_an_arp_request_says_the_address(world: World) -> None:
    world.ask(ANN, ANN_IP)
    assert events(world.monitor, 2) == [ANN_LEARNED, ANN_RESOLVED]
    assert set(world.monitor.dump()) == {ANN_LEARNED, ANN_RESOLVED}


def test_an_aged_client(world: World) -> None:
    world.speak(ANN)
    world.speak(BEN)
    world.age(ANN)
    assert events(world.monitor, 3)[-1] == ClientAged(LAN, ANN)
    assert world.monitor.dump() == [ClientSeen(LAN, BEN, Source.FDB)]


def test_a_packet_of_a_client_that_is_not_known_here(world: World) -> None:
    world.speak(BEN)
    events(world.monitor, 1)
    world.send(BEN, BEN_IP)
    assert events(world.monitor, 1) == [ClientSeen(LAN, BEN, Source.DATA, BEN_IP)]


@pytest.mark.netns
def test_a_packet_of_a_client_that_is_known_here_says_nothing(real: RealWorld) -> None:
    real.path.apply({LAN: NetworkDelta(known={ANN_IP: Change(None, ANN)})})
    real.speak(ANN)
    real.send(ANN, ANN_IP)
    real.speak(BEN)
    assert events(real.monitor, 2) == [ANN_LEARNED, ClientSeen(LAN, BEN, Source.FDB)]
    real.send(BEN, ANN_IP)
    assert events(real.monitor, 1) == [ClientSeen(LAN, BEN, Source.DATA, ANN_IP)]


def test_an_overflow_is_said_once_and_the_dump_is_right(world: World) -> None:
    world.speak(ANN)
    world.overflow()
    assert readable(world.monitor)
    with pytest.raises(EventsLost):
        world.monitor.read()
    assert ANN_LEARNED in world.monitor.dump()
    world.monitor.read()
    world.speak(BEN)
    assert ClientSeen(LAN, BEN, Source.FDB) in events(world.monitor, 1)


@pytest.mark.netns
def test_a_pair_is_reported_once(real: RealWorld) -> None:
    for _ in range(3):
        real.access_point.send_arp(ANN, ANN_IP)
        run("ip", "neighbour", "change", str(ANN_IP), "dev", "br-lan", "nud", "reachable")
        run("ip", "neighbour", "change", str(ANN_IP), "dev", "br-lan", "nud", "stale")
    real.speak(BEN)
    assert events(real.monitor, 3) == [
        ANN_LEARNED,
        ANN_RESOLVED,
        ClientSeen(LAN, BEN, Source.FDB),
    ]


@pytest.mark.netns
def test_a_changed_mac_is_reported(real: RealWorld) -> None:
    real.access_point.send_arp(ANN, ANN_IP)
    run("ip", "neighbour", "replace", str(ANN_IP), "lladdr", BEN, "dev", "br-lan", "nud", "stale")
    changed = ClientSeen(LAN, BEN, Source.NEIGHBOUR, ANN_IP)
    assert events(real.monitor, 3) == [ANN_LEARNED, ANN_RESOLVED, changed]


@pytest.mark.netns
def test_a_forgotten_client_that_returns_is_seen_again(real: RealWorld) -> None:
    real.access_point.send_arp(ANN, ANN_IP)
    real.path.apply({LAN: NetworkDelta(neighbours={ANN_IP: Change(None, ANN)})})
    real.path.apply({LAN: NetworkDelta(neighbours={ANN_IP: Change(ANN, None)})})
    real.path.forget_client(LAN, ANN, [])
    assert events(real.monitor, 3) == [ANN_LEARNED, ANN_RESOLVED, ClientAged(LAN, ANN)]
    real.access_point.send_arp(ANN, ANN_IP)
    assert events(real.monitor, 2) == [ANN_LEARNED, ANN_RESOLVED]


@pytest.mark.netns
def test_a_client_that_moves_to_another_port(real: RealWorld) -> None:
    real.access_point.send_hello(ANN)
    real.access_point.send_hello(ANN, port=1)
    assert events(real.monitor, 2) == [ANN_LEARNED, ANN_LEARNED]


@pytest.mark.netns
def test_what_is_installed_is_not_seen(real: RealWorld) -> None:
    run("bridge", "fdb", "add", "02:00:00:00:00:77", "dev", "port1", "master", "static")
    real.path.apply(
        {
            LAN: NetworkDelta(
                neighbours={BEN_IP: Change(None, BEN)}, routes={ANN_IP: Change(None, AP2)}
            )
        }
    )
    assert real.monitor.dump() == []
    real.speak(ANN)
    assert events(real.monitor, 1) == [ANN_LEARNED]


@pytest.mark.netns
@pytest.mark.parametrize("address", ["10.78.0.5", "10.77.0.1"])
def test_addresses_that_no_client_has(real: RealWorld, address: str) -> None:
    if address != "10.77.0.1":
        run("ip", "address", "add", "10.78.0.1/16", "dev", "br-lan")
    run("ip", "neighbour", "add", address, "lladdr", BEN, "dev", "br-lan", "nud", "stale")
    real.access_point.send_arp(ANN, ANN_IP)
    assert events(real.monitor, 2) == [ANN_LEARNED, ANN_RESOLVED]
    assert set(real.monitor.dump()) == {ANN_LEARNED, ANN_RESOLVED}


@pytest.mark.netns
def test_a_stale_neighbour_that_the_bridge_forgot_is_no_evidence(real: RealWorld) -> None:
    real.access_point.send_arp(ANN, ANN_IP)
    real.age(ANN)
    assert real.monitor.dump() == []


@pytest.mark.netns
def test_another_reader_of_the_log_group_is_named(real: RealWorld) -> None:
    with pytest.raises(KernelFault, match=r"nflog group 77.*kernel\.nflog_group"):
        LinuxClientMonitor(DOMAIN)
