"""Who uses a NAT address on the uplink's segment, by real ARP of real kernels."""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from apagent.core.model import Mac, NatAddress
from apagent.errors import KernelFault
from apagent.kernel.address_watch import LinuxAddressWatch
from tests.contract.conftest import AccessPoint, run
from tests.contract.flow_support import namespace, run_inside
from tests.domains import LAN, takeover

pytestmark = pytest.mark.netns

NETWORK = takeover()
assert NETWORK.nat_address is not None
NAT = NatAddress(LAN, NETWORK.nat_address)
LOW, HIGH = Mac("02:00:00:00:00:03"), Mac("02:ff:00:00:00:03")
OWN = Mac("02:80:00:00:00:03")
PATIENCE_S, QUIET_S = 2.0, 0.1


@pytest.fixture
def neighbour(access_point: AccessPoint) -> Iterator[int]:
    """Another machine on the segment, in whose place `internet` was."""
    with ExitStack() as stack:
        pid = namespace(stack)
        run("ip", "link", "set", "wan", "address", OWN)
        run("ip", "link", "set", "internet", "netns", str(pid))
        run_inside(pid, "ip", "link", "set", "internet", "address", LOW, "up")
        yield pid


@pytest.fixture
def watch(neighbour: int) -> Iterator[LinuxAddressWatch]:
    with closing(LinuxAddressWatch([NETWORK])) as watch:
        yield watch


def heard(watch: LinuxAddressWatch, seconds: float = PATIENCE_S) -> list[tuple[NatAddress, Mac]]:
    select.select([watch], [], [], seconds)
    return watch.read()


def say(pid: int, text: str) -> None:
    """Send a frame from the neighbour, written in Python with `arp`, an ArpAnnouncer, at hand."""
    code = (
        "from ipaddress import IPv4Address\n"
        "from apagent.kernel.arp import ArpAnnouncer\n"
        f"arp = ArpAnnouncer('internet')\n{text}\n"
    )
    run_inside(pid, sys.executable, "-c", code)


def test_an_address_that_somebody_has_answers(watch: LinuxAddressWatch, neighbour: int) -> None:
    run_inside(neighbour, "ip", "address", "add", f"{NAT.address}/24", "dev", "internet")
    watch.probe(NAT)
    assert heard(watch) == [(NAT, LOW)]


def test_nobody_answers_for_a_free_one(watch: LinuxAddressWatch, neighbour: int) -> None:
    run_inside(neighbour, "ip", "address", "add", "203.0.113.77/24", "dev", "internet")
    watch.probe(NAT)
    assert heard(watch, 0.3) == []


def test_an_announcement_is_a_conflict_also_while_we_use_it(
    watch: LinuxAddressWatch, neighbour: int
) -> None:
    watch.announce(NAT)
    say(neighbour, f"arp.tell_all([IPv4Address('{NAT.address}')])")
    assert heard(watch) == [(NAT, LOW)]


@pytest.mark.parametrize(("mac", "uses"), [(LOW, True), (HIGH, False)])
def test_of_two_that_ask_at_once_the_lower_mac_goes_first(
    watch: LinuxAddressWatch, neighbour: int, mac: Mac, *, uses: bool
) -> None:
    run_inside(neighbour, "ip", "link", "set", "internet", "address", mac)
    watch.probe(NAT)
    say(neighbour, f"arp.ask(IPv4Address('{NAT.address}'))")
    assert heard(watch, 0.5) == ([(NAT, mac)] if uses else [])


def test_another_user_of_our_own_address_is_heard_at_once(
    watch: LinuxAddressWatch, neighbour: int
) -> None:
    """An earlier run of ours may have asked for it, and left it on the uplink."""
    say(neighbour, f"arp.tell_all([IPv4Address('{NAT.address}')])")
    assert heard(watch) == [(NAT, LOW)]


def test_who_has_asked_in_vain_is_not_disturbed_by_another_question(
    watch: LinuxAddressWatch, neighbour: int
) -> None:
    """By then the address is ours, and whoever asks for it gets our answer."""
    run_inside(neighbour, "ip", "link", "set", "internet", "address", LOW)
    watch.probe(NAT)
    watch.stop_probing(NAT)
    say(neighbour, f"arp.ask(IPv4Address('{NAT.address}'))")
    assert heard(watch, 0.3) == []


def test_a_question_about_an_address_that_we_use_is_no_conflict(
    watch: LinuxAddressWatch, neighbour: int
) -> None:
    watch.announce(NAT)
    say(neighbour, f"arp.ask(IPv4Address('{NAT.address}'))")
    assert heard(watch, 0.3) == []


def test_other_addresses_do_not_even_wake_us(watch: LinuxAddressWatch, neighbour: int) -> None:
    watch.announce(NAT)
    say(neighbour, "arp.tell_all([IPv4Address('203.0.113.77')] * 5)")
    time.sleep(QUIET_S)
    assert select.select([watch], [], [], 0)[0] == []


def test_our_own_frames_are_not_heard(watch: LinuxAddressWatch) -> None:
    watch.announce(NAT)
    watch.probe(NAT)
    time.sleep(QUIET_S)
    assert watch.read() == []


def test_an_uplink_that_is_gone_is_named_and_one_that_returns_is_heard(
    watch: LinuxAddressWatch, neighbour: int
) -> None:
    run("ip", "link", "del", "wan")
    with pytest.raises(KernelFault, match="wan"):
        watch.probe(NAT)
    run("ip", "link", "add", "wan", "type", "veth", "peer", "name", "internet")
    run("ip", "link", "set", "internet", "netns", str(neighbour))
    run("ip", "link", "set", "wan", "up")
    run_inside(neighbour, "ip", "link", "set", "internet", "address", LOW, "up")
    run_inside(neighbour, "ip", "address", "add", f"{NAT.address}/24", "dev", "internet")
    watch.probe(NAT)
    assert heard(watch) == [(NAT, LOW)]
