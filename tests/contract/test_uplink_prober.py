"""An uplink that is gone, down, unplugged, or leads to nobody."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from ipaddress import IPv4Address

import pytest

from apagent.kernel.uplinks import ROUNDS_A_PING, SILENT_ROUNDS, LinuxUplinkProber
from tests.contract.conftest import AccessPoint, run
from tests.contract.flow_support import namespace, run_inside
from tests.domains import LAN, lan

pytestmark = pytest.mark.netns

ROUTER = IPv4Address("203.0.113.1")
PROBING = replace(lan(), uplink_probes=(ROUTER, IPv4Address("203.0.113.99")))


@pytest.fixture
def router(access_point: AccessPoint) -> Iterator[int]:
    """Another machine at the other end of the uplink."""
    with ExitStack() as stack:
        pid = namespace(stack)
        run("ip", "link", "set", "internet", "netns", str(pid))
        run_inside(pid, "ip", "link", "set", "internet", "up")
        yield pid


def rounds(prober: LinuxUplinkProber, count: int, pause_s: float = 0.001) -> str:
    """Some rounds; the last answer."""
    trouble = ""
    for _ in range(count):
        prober.probe()
        time.sleep(pause_s)
        trouble = prober.answered()[LAN]
    return trouble


def until_running() -> None:
    """A carrier is reported late by the kernel."""
    for _ in range(200):
        if "LOWER_UP" in run("ip", "link", "show", "wan"):
            return
        time.sleep(0.01)


def test_without_hosts_to_ping_the_carrier_counts(router: int) -> None:
    with closing(LinuxUplinkProber([lan()])) as prober:
        until_running()
        assert prober.answered() == {LAN: ""}
        run_inside(router, "ip", "link", "set", "internet", "down")
        assert prober.answered() == {LAN: "interface wan has no carrier"}
        run("ip", "link", "set", "wan", "down")
        assert prober.answered() == {LAN: "interface wan is down"}
        run("ip", "link", "del", "wan")
        assert prober.answered() == {LAN: "interface wan is gone"}


def test_one_host_that_answers_is_enough(router: int) -> None:
    run_inside(router, "ip", "address", "add", f"{ROUTER}/24", "dev", "internet")
    with closing(LinuxUplinkProber([PROBING])) as prober:
        assert rounds(prober, 2 * SILENT_ROUNDS, 0.01) == ""


def test_where_no_host_answers_the_uplink_leads_nowhere(router: int) -> None:
    with closing(LinuxUplinkProber([PROBING])) as prober:
        assert rounds(prober, SILENT_ROUNDS - 1) == ""
        trouble = rounds(prober, 1)
        assert trouble.startswith("no answer by wan from 203.0.113.1, 203.0.113.99")
        run_inside(router, "ip", "address", "add", f"{ROUTER}/24", "dev", "internet")
        assert rounds(prober, 5 * ROUNDS_A_PING, 0.02) == ""


def test_an_uplink_that_is_gone_and_returns(router: int) -> None:
    with closing(LinuxUplinkProber([PROBING])) as prober:
        run("ip", "link", "del", "wan")
        assert "gone" in rounds(prober, 3)
        run("ip", "link", "add", "wan", "type", "veth", "peer", "name", "internet")
        run("ip", "link", "set", "internet", "netns", str(router))
        run("ip", "address", "add", "203.0.113.11/24", "dev", "wan")
        run("ip", "link", "set", "wan", "up")
        run_inside(router, "ip", "address", "add", f"{ROUTER}/24", "dev", "internet")
        run_inside(router, "ip", "link", "set", "internet", "up")
        until_running()
        assert rounds(prober, 5 * ROUNDS_A_PING, 0.02) == ""
