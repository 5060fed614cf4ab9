"""NAT addresses on the uplink of a real kernel: told from the operator's, announced, removed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from ipaddress import IPv4Address

import pytest

from apagent.core.domain import Network
from apagent.core.model import Mac
from apagent.errors import KernelFault
from apagent.kernel.arp import ArpAnnouncer
from apagent.kernel.linux import ANNOUNCE_AGAIN_S, LinuxDataPath
from apagent.kernel.port import Change, NetworkDelta
from tests.contract import packets
from tests.contract.conftest import AccessPoint, run
from tests.contract.packets import BROADCAST, Arp, Wire
from tests.domains import ANN, ANN_IP, LAN, domain, lan, takeover

pytestmark = pytest.mark.netns

DOMAIN = domain(networks=(takeover(),))
OURS, THEIRS = IPv4Address("203.0.113.21"), IPv4Address("203.0.113.22")
REQUEST = 1


class Later:
    """Keeps what is to be done later."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, Callable[[], None]]] = []

    def __call__(self, delay_s: float, callback: Callable[[], None]) -> None:
        self.calls.append((delay_s, callback))

    def pass_(self) -> None:
        """All of the time passes."""
        calls, self.calls = self.calls, []
        for _, callback in calls:
            callback()


@pytest.fixture
def later() -> Later:
    return Later()


@pytest.fixture
def path(access_point: AccessPoint, later: Later) -> Iterator[LinuxDataPath]:
    path = LinuxDataPath(later)
    path.prepare(DOMAIN)
    yield path
    path.close()


@pytest.fixture
def segment(access_point: AccessPoint) -> Iterator[Wire]:
    """What the uplink's segment hears."""
    with packets.wire("internet") as wire:
        yield wire


def hold(path: LinuxDataPath, *addresses: IPv4Address) -> None:
    path.apply({LAN: NetworkDelta(addresses={a: Change(None, new=True) for a in addresses})})


def release(path: LinuxDataPath, *addresses: IPv4Address) -> None:
    path.apply({LAN: NetworkDelta(addresses={a: Change(old=True, new=None) for a in addresses})})


def addresses(interface: str = "wan") -> list[str]:
    """As `ip address` has them, primary ones first."""
    lines = run("ip", "-4", "-o", "address", "show", "dev", interface).splitlines()
    return [line.split(f"{interface}    inet ")[1].split()[0] for line in lines]


def test_the_operators_addresses_are_left_alone(path: LinuxDataPath) -> None:
    run("ip", "address", "add", f"{OURS}/32", "dev", "wan")
    run("ip", "address", "add", f"{THEIRS}/24", "dev", "wan")
    before = addresses()
    hold(path, OURS, THEIRS)
    assert path.read()[LAN].addresses == {THEIRS: True}
    assert set(addresses()) == {*before, f"{THEIRS}/32"}
    release(path, THEIRS)
    assert addresses() == before
    assert path.remove(DOMAIN)
    assert addresses() == before


def test_the_operator_is_told_of_an_address_that_is_not_for_him_to_set(
    path: LinuxDataPath,
) -> None:
    run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    hold(path, OURS)
    assert path.warnings() == []
    run("ip", "address", "add", f"{OURS}/24", "dev", "br-zoo")
    [warning] = path.warnings()
    assert "203.0.113.21 (networks[0].nat) is configured on br-zoo" in warning


def test_removal_leaves_secondaries_of_others(path: LinuxDataPath) -> None:
    run("sysctl", "-qw", "net.ipv4.conf.wan.promote_secondaries=0")
    hold(path, OURS)
    run("ip", "address", "add", "203.0.113.40/32", "dev", "wan")
    run("ip", "address", "add", "203.0.113.41/24", "dev", "wan")
    release(path, OURS)
    assert set(addresses()) == {"203.0.113.11/24", "203.0.113.40/32", "203.0.113.41/24"}


def test_masquerading_goes_on_with_the_uplinks_own_address(
    path: LinuxDataPath, access_point: AccessPoint, segment: Wire
) -> None:
    path.release_hold()
    run("ip", "address", "del", "203.0.113.11/24", "dev", "wan")
    hold(path, OURS)
    run("ip", "address", "add", "203.0.113.11/24", "dev", "wan")
    access_point.forward_to_the_internet()
    access_point.send_udp(ANN, ANN_IP)
    [sent] = segment.packets_until(lambda _: True)
    assert sent.source == IPv4Address("203.0.113.11")


def test_a_new_address_is_announced_and_again_while_it_is_held(
    path: LinuxDataPath, later: Later, segment: Wire
) -> None:
    us = packets.mac_of("wan")
    no_mac = Mac("00:00:00:00:00:00")
    hold(path, OURS)
    announced = Arp(BROADCAST, REQUEST, us, OURS, no_mac, OURS)
    assert segment.arps_until(lambda _: True) == [announced]
    assert [delay for delay, _ in later.calls] == list(ANNOUNCE_AGAIN_S)
    later.pass_()
    assert [segment.arps_until(lambda _: True) for _ in ANNOUNCE_AGAIN_S] == [[announced]] * 2
    hold(path, THEIRS)
    release(path, THEIRS)
    later.pass_()
    hold(path, IPv4Address("203.0.113.23"))
    heard = segment.arps_until(lambda arp: arp.sender_address == IPv4Address("203.0.113.23"))
    assert [arp.sender_address for arp in heard[:-1]] == [THEIRS]


def test_an_uplink_that_is_gone_keeps_nothing_else_from_being_installed(
    path: LinuxDataPath, later: Later
) -> None:
    hold(path, OURS)
    run("ip", "link", "del", "wan")
    assert path.read()[LAN].addresses == {}
    later.pass_()
    hold(path, OURS)
    release(path, OURS)
    assert path.read()[LAN].addresses == {}


def test_an_uplink_without_arp_is_not_spoken_to(path: LinuxDataPath) -> None:
    path.prepare(domain(networks=(replace(takeover(), uplink="lo"),)))
    hold(path, OURS)
    assert path.read()[LAN].addresses == {OURS: True}
    with (
        closing(ArpAnnouncer("lo")) as announcer,
        pytest.raises(KernelFault, match="lo: it is no Ethernet interface"),
    ):
        announcer.tell_all([OURS])


@pytest.mark.parametrize(
    "network",
    [lan(), replace(takeover(), vni=99), replace(takeover(), uplink="underlay")],
    ids=["without takeover", "of another VNI", "with another uplink"],
)
def test_what_a_former_configuration_left_is_removed(path: LinuxDataPath, network: Network) -> None:
    hold(path, OURS)
    path.prepare(replace(DOMAIN, networks=(network,)))
    assert addresses() == ["203.0.113.11/24"]
