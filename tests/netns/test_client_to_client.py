"""Clients of a network reach each other on whatever APs they are, untranslated."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address

import pytest

from apagent.lab.lab import Lab
from apagent.lab.measure import Echoes
from apagent.lab.plan import CLIENT_PREFIX
from apagent.lab.traffic.running import Running, running, serving
from tests.netns.conftest import MakeLab
from tests.netns.nat_support import accepted, exchange, flows, listening, ping, roam, tcp
from tests.netns.observe import SERVER, address, becomes, eventually

pytestmark = pytest.mark.netns

GATEWAY_MAC = "02:00:00:00:00:fe"
RATE = 500
"""Datagrams a second."""
START_S = 10.0
PART_AND_MEET = (("client1", "ap2"), ("client1", "ap1"), ("client2", "ap3"), ("client2", "ap1"))
NOISE_S = 0.1


@pytest.fixture(scope="module")
def domain(module_lab: MakeLab) -> Lab:
    made = module_lab(aps=3, clients=2)
    _introduce(made)
    return made


def _introduce(lab: Lab) -> None:
    """Let each client say something, as DHCP would have; then all APs know its address."""
    for client in lab.clients:
        assert ping(lab, client, SERVER)[0] == 1
    becomes(lambda: {len(_located(lab, ap)) for ap in lab.aps}, {len(lab.clients)})


def _located(lab: Lab, ap: str) -> set[str]:
    """Client addresses that the AP's kernel knows the way to."""
    routes = lab.run(ap, ["ip", "route", "show", "table", "77000"], check=False).stdout
    near = lab.run(ap, ["ip", "neigh", "show", "nud", "permanent", "dev", "br-lan"]).stdout
    found = {line.split()[0] for line in (*routes.splitlines(), *near.splitlines())}
    return {address for address in found if IPv4Address(address) in CLIENT_PREFIX}


@contextlib.contextmanager
def connection(lab: Lab) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP connection from client1 to client2, of which client2 sees the true source."""
    to = address(lab, "client2")
    with (
        listening(lab, "client2", to) as listener,
        tcp(lab, "client1", listener.getsockname()) as a,
    ):
        b, source = accepted(listener)
        with b:
            assert source == a.getsockname() == (address(lab, "client1"), source[1])
            exchange(a, b)
            yield a, b


def arrange(lab: Lab, client1: str, client2: str) -> None:
    roam(lab, "client1", client1)
    roam(lab, "client2", client2)


def test_tcp_and_ping_before_and_after_either_roams(domain: Lab) -> None:
    arrange(domain, "ap1", "ap2")
    with connection(domain) as (one, other):
        for who, ap in (("client1", "ap3"), ("client2", "ap1"), ("client1", "ap2")):
            roam(domain, who, ap)
            exchange(one, other)
            exchange(other, one)
            for client, peer in (("client1", "client2"), ("client2", "client1")):
                assert ping(domain, client, address(domain, peer), count=3)[0] == 3
            with connection(domain):
                pass
    for ap in domain.aps:
        assert not [flow for flow in flows(domain, ap) if flow.remote.startswith("10.77.")]


def test_a_client_finds_one_elsewhere_by_proxy_arp(domain: Lab) -> None:
    arrange(domain, "ap1", "ap2")
    domain.run("client1", ["ip", "neigh", "flush", "dev", "wlan0"])
    assert ping(domain, "client1", address(domain, "client2"))[0] == 1
    entry = domain.run("client1", ["ip", "neigh", "show", address(domain, "client2")]).stdout
    assert GATEWAY_MAC in entry


@pytest.mark.parametrize(
    ("carrier", "path", "dwell_s"),
    [
        pytest.param(False, PART_AND_MEET, 0.5, id="carrier stays"),
        # Asked for too early, while the link comes up, a neighbour is asked for again in a second.
        pytest.param(True, PART_AND_MEET[:2], 1.4, id="carrier is lost"),
    ],
)
def test_neighbours_part_and_meet_again(
    domain: Lab,
    record_property: Callable[[str, object], None],
    carrier: bool,
    path: tuple[tuple[str, str], ...],
    dwell_s: float,
) -> None:
    """Both hold the other's MAC when one roams away: both entries have to be mended.

    Where nothing mends them, it lasts until the client is back.
    """
    arrange(domain, "ap1", "ap1")
    eventually(lambda: ping(domain, "client1", address(domain, "client2"))[0])
    with serving(domain, "client2"), _echo(domain) as echo:
        up = []
        for client, ap in path:
            time.sleep(dwell_s)
            up.append(domain.roam(client, ap, carrier=carrier))
        time.sleep(dwell_s)
        echo.stop()
        result = echo.result(START_S)
    gaps = [Echoes.of(echo.events).interruption_ns(moment) for moment in up]
    found = [None if gap is None else round(gap / 1e6, 1) for gap in gaps]
    record_property("interruptions_ms", found)
    record_property("lost", f"{result['lost']} of {result['sent']}")
    bound_ms = (dwell_s - NOISE_S) * 1e3
    assert all(gap is not None and gap < bound_ms for gap in found), found
    assert {source.split(":")[0] for source in result["sources"]} == {address(domain, "client1")}


@contextlib.contextmanager
def _echo(lab: Lab) -> Iterator[Running]:
    with running(lab, "client1", "echo", address(lab, "client2"), "--rate", RATE) as echo:
        echo.wait_for("started", START_S)
        yield echo


def test_isolated_clients_reach_the_internet_but_not_each_other(lab: MakeLab) -> None:
    options = "isolate_clients = true\n"
    made = lab(aps=2, clients=2, options=dict.fromkeys(("ap1", "ap2"), options))
    _introduce(made)
    for client, peer in (("client1", "client2"), ("client2", "client1")):
        to = address(made, peer)
        assert ping(made, client, to, wait_s=0.5)[0] == 0
        # Nor does it help to send to the gateway what is meant for the other client.
        made.run(client, ["ip", "neigh", "replace", to, "lladdr", GATEWAY_MAC, "dev", "wlan0"])
        assert ping(made, client, to, wait_s=0.5)[0] == 0
        assert ping(made, client, SERVER)[0] == 1
    with (
        listening(made, "server", SERVER) as listener,
        tcp(made, "client1", listener.getsockname()) as one,
    ):
        other, _ = accepted(listener)
        with other:
            roam(made, "client1", "ap2")
            exchange(one, other)
