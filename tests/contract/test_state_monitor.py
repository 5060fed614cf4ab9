"""The contract of a `StateMonitor`, kept by the fake and by the real kernel."""

from __future__ import annotations

import select
from collections.abc import Iterator
from typing import Protocol

import pytest

from apagent.errors import EventsLost
from apagent.kernel.linux import LinuxDataPath
from apagent.kernel.port import Change, DataPath, Doubt, NetworkDelta, StateMonitor
from tests.contract.conftest import AccessPoint, run
from tests.contract.test_data_path import DOMAIN, arrivals
from tests.domains import ANN, ANN_IP, AP2, AP3, BEN, BEN_IP, LAN
from tests.fakes.kernel import FakeDataPath

NOTHING = Doubt(0)
LINK = Doubt.INTERFACES | Doubt.ROUTING
DEVICE = "apv-lan"
PEER, OTHER_PEER = DOMAIN.peers[0], DOMAIN.peers[1]
ENTRY = f"{PEER.tunnel_mac} dev {DEVICE} dst {PEER.underlay}"


class World(Protocol):
    """A data path with state of ours, and a monitor that watches it."""

    path: DataPath
    monitor: StateMonitor

    def remove_route(self) -> None:
        """Another program removes Ben's host route."""

    def overflow(self) -> None:
        """More happens than the monitor has room for."""

    def close(self) -> None:
        """The end."""


class FakeWorld:
    def __init__(self) -> None:
        self.fake = FakeDataPath()
        self.path: DataPath = self.fake
        self.path.prepare(DOMAIN)
        self.path.apply({LAN: arrivals()})
        self.monitor: StateMonitor = self.fake.watch()

    def remove_route(self) -> None:
        del self.fake.kernel.states[LAN].routes[BEN_IP]
        self.fake.kernel.tamper(Doubt.ROUTING)

    def overflow(self) -> None:
        for monitor in self.fake.kernel.monitors:
            monitor.lose_events()

    def close(self) -> None:
        self.monitor.close()


class RealWorld:
    def __init__(self) -> None:
        self.path: DataPath = LinuxDataPath()
        self.path.prepare(DOMAIN)
        self.path.apply({LAN: arrivals()})
        self.monitor: StateMonitor = self.path.watch()

    def remove_route(self) -> None:
        run("ip", "route", "del", f"{BEN_IP}", "table", "77000")

    def overflow(self) -> None:
        rules = "\n".join(
            f"rule add to 192.0.2.{i % 256} priority {i} table 9" for i in range(9000)
        )
        run("ip", "-batch", "-", stdin=rules)

    def close(self) -> None:
        self.monitor.close()
        self.path.close()


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.netns)])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    made: World
    if request.param == "real":
        request.getfixturevalue("access_point")
        made = RealWorld()
    else:
        made = FakeWorld()
    yield made
    made.close()


def is_waiting(monitor: StateMonitor) -> bool:
    return bool(select.select([monitor.fileno()], [], [], 0)[0])


def test_quiet_at_first(world: World) -> None:
    assert not is_waiting(world.monitor)
    assert world.monitor.read() is NOTHING


def test_our_own_changes_are_no_news(world: World) -> None:
    world.path.apply({LAN: NetworkDelta(routes={BEN_IP: Change(AP2, AP3)})})
    world.path.apply({LAN: NetworkDelta(routes={BEN_IP: Change(AP3, None)})})
    assert not is_waiting(world.monitor)


def test_a_check_that_finds_nothing_wrong_is_no_news(world: World) -> None:
    world.path.prepare(DOMAIN)
    world.path.read()
    assert not is_waiting(world.monitor)


def test_what_others_remove_is_said_once(world: World) -> None:
    world.remove_route()
    assert is_waiting(world.monitor)
    assert Doubt.ROUTING in world.monitor.read()
    assert not is_waiting(world.monitor)


def test_an_overflow_is_said_once(world: World) -> None:
    world.overflow()
    with pytest.raises(EventsLost):
        world.monitor.read()
    world.monitor.read()
    assert not is_waiting(world.monitor)
    world.remove_route()
    assert Doubt.ROUTING in world.monitor.read()


# --- the real kernel alone


@pytest.fixture
def real(access_point: AccessPoint) -> Iterator[RealWorld]:
    world = RealWorld()
    yield world
    world.close()


@pytest.mark.netns
@pytest.mark.parametrize(
    ("command", "doubt"),
    [
        ("ip rule del priority 702", Doubt.ROUTING),
        ("ip route del default table 77001", Doubt.ROUTING),
        ("ip route replace default via 10.99.0.7 dev underlay table 77001", Doubt.ROUTING),
        (f"ip address del {DOMAIN.me.tunnel_address}/32 dev {DEVICE}", Doubt.ROUTING),
        (f"ip address add 192.0.2.1/32 dev {DEVICE}", Doubt.ROUTING),
        (f"ip neigh del {PEER.tunnel_address} dev {DEVICE}", Doubt.ROUTING),
        ("ip neigh replace 10.77.1.1 lladdr 02:00:00:00:00:98 dev br-lan", Doubt.ROUTING),
        ("ip neigh del 10.77.1.1 dev br-lan", Doubt.ROUTING),
        (f"bridge fdb del {ENTRY}", Doubt.ROUTING),
        (f"bridge fdb add 02:00:00:00:00:98 dev {DEVICE} dst 10.99.0.98", Doubt.ROUTING),
        (f"ip link set {DEVICE} down", LINK),
        (f"ip link set {DEVICE} mtu 1400", LINK),
        (f"ip link set {DEVICE} address 02:00:00:00:00:98", LINK),
        (f"ip link set {DEVICE} down name other", LINK),
        (f"ip link del {DEVICE}", LINK),
        ("ip link set br-lan down", LINK),
        ("ip link del br-lan", LINK),
        ("ip link set wan down", LINK),
        ("ip link del wan", LINK),
        ("sysctl -qw net.ipv4.conf.br-lan.rp_filter=1", Doubt.ROUTING),
        ("sysctl -qw net.ipv4.conf.br-lan.proxy_arp=0", Doubt.ROUTING),
        ("sysctl -qw net.ipv4.conf.all.rp_filter=1", Doubt.ROUTING),
        # What is not ours:
        ("ip rule add priority 5 from 192.0.2.1 lookup 9", NOTHING),
        ("ip route add 192.0.2.0/24 via 10.99.0.7", NOTHING),
        ("ip address add 192.0.2.1/32 dev underlay", NOTHING),
        ("ip neigh add 10.99.0.7 lladdr 02:00:00:00:00:98 dev underlay", NOTHING),
        ("bridge fdb add 02:00:00:00:00:98 dev port1 master", NOTHING),
        ("ip link set underlay mtu 1400", NOTHING),
        ("ip link add other type bridge", NOTHING),
        ("sysctl -qw net.ipv4.conf.underlay.rp_filter=1", NOTHING),
        ("nft add table inet fw4", NOTHING),
    ],
)
def test_which_changes_by_others_raise_which_doubt(
    real: RealWorld, command: str, doubt: Doubt
) -> None:
    run(*command.split())
    assert real.monitor.read() == doubt


@pytest.mark.netns
def test_the_life_of_the_neighbour_table_does_not_wake_us(
    real: RealWorld, access_point: AccessPoint
) -> None:
    access_point.send_arp(BEN, BEN_IP)
    access_point.send_arp(ANN, ANN_IP, port=1)
    real.path.forget_client(LAN, BEN, [BEN_IP])
    assert not is_waiting(real.monitor)


@pytest.fixture
def unowned(access_point: AccessPoint) -> Iterator[RealWorld]:
    """As on a kernel before 6.9: anybody can change our table. One that is there stays so."""
    run("nft", "add table inet apagent")
    world = RealWorld()
    yield world
    world.close()


@pytest.mark.netns
@pytest.mark.parametrize(
    ("command", "doubt"),
    [
        ("nft flush ruleset", Doubt.TABLE),
        ("nft delete table inet apagent", Doubt.TABLE),
        ("nft flush chain inet apagent leak_guard", Doubt.TABLE),
        ("nft flush map inet apagent lan_flows", Doubt.TABLE),
        ("nft add element inet apagent lan_arrived { 10.77.9.9 }", Doubt.TABLE),
        ("nft add table inet apagent { flags dormant; }", Doubt.TABLE),
        ("nft add table inet fw4", NOTHING),
        ("nft add table ip other", NOTHING),
    ],
)
def test_an_unowned_table_is_watched(unowned: RealWorld, command: str, doubt: Doubt) -> None:
    run("nft", command.removeprefix("nft "))
    assert unowned.monitor.read() == doubt


@pytest.mark.netns
def test_our_own_changes_of_an_unowned_table_do_not_wake_us(unowned: RealWorld) -> None:
    flows = {flow: Change(AP2, AP3) for flow in arrivals().flows}
    unowned.path.apply({LAN: NetworkDelta(flows=flows)})
    unowned.path.release_hold()
    assert not is_waiting(unowned.monitor)
