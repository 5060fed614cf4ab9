"""A roam doesn't wait for user space: kernels learn from the client's own packets where it is."""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address

import pytest

from apagent.core.domain import tunnel_mac
from apagent.core.model import ApId, Mac
from apagent.kernel.nft.sets import LEARNED_MS
from apagent.lab import namespaces
from apagent.lab.capture import Capture, touching
from apagent.lab.lab import Lab
from apagent.lab.measure import Arrivals, Echoes
from apagent.lab.plan import CLIENT_PREFIX, GATEWAY, GATEWAY_MAC, RADIO
from apagent.lab.traffic import ECHO_PORT
from apagent.lab.traffic.running import Running, running, serving
from tests.contract.packets import frame, udp
from tests.netns.conftest import MakeLab
from tests.netns.early_flows import stopped
from tests.netns.nat_support import ping, roam
from tests.netns.observe import SERVER, address, becomes, mac, served_by, uplink

pytestmark = pytest.mark.netns

RATE = 1000
DWELL_S = 0.6
LEARNED_S = LEARNED_MS / 1000
NOISE = 60
"""Echoes that a busy machine may lose or delay at each roam; without learning all are lost."""
TUNNEL = "apv-lan"
_CLOSED = 9
"""A port of the server that nobody listens at."""


@pytest.fixture(scope="module")
def domain(module_lab: MakeLab) -> Iterator[Lab]:
    made = module_lab(aps=3, clients=2)
    with serving(made):
        yield made


@contextlib.contextmanager
def echo(lab: Lab, client: str = "client1") -> Iterator[Running]:
    with running(lab, client, "echo", SERVER, "--rate", RATE) as started:
        started.wait_for("started", 10.0)
        time.sleep(0.2)
        yield started
        started.stop()
        started.result(10.0)


def known_as_elsewhere(lab: Lab, client: str, ap: str) -> None:
    """Wait until the other APs' kernels know the client as one that `ap` serves."""
    served_by(lab, client, ap)
    pair = f"{address(lab, client)} . {mac(lab, client)}"
    listing = ["nft", "list", "set", "inet", "apagent", "lan_elsewhere"]
    others = [other for other in lab.aps if other != ap]
    becomes(lambda: all(pair in lab.run(other, listing).stdout for other in others), wanted=True)


def test_a_roam_waits_for_no_agent(
    domain: Lab, record_property: Callable[[str, object], None]
) -> None:
    """All agents are stopped: not one claim is made, and echoes and a transfer go on."""
    roam(domain, "client1", "ap1")
    size = ("--size", 8_000_000, "--rate-mbit", 8, "--deadline-s", 60)
    with running(domain, "client1", "download", SERVER, *size) as download, echo(domain) as traffic:
        assert download.wait_for("connected", 10.0)["address"] == uplink("ap1")
        known_as_elsewhere(domain, "client1", "ap1")
        linked = []
        with stopped(domain, *domain.aps):
            for ap in ("ap2", "ap3", "ap2", "ap1"):
                linked.append(domain.roam("client1", ap))
                time.sleep(DWELL_S)
            arrived = Arrivals.of(download.events)
        served_by(domain, "client1", "ap1")
        result = download.result(60.0)
    assert (result["completed"], result["sha256_match"]) == (True, True), result
    echoes = Echoes.of(traffic.events)
    ends = [up + round(DWELL_S * 1e9) for up in linked]
    lost = [echoes.lost(*dwell) for dwell in zip(linked, ends, strict=True)]
    record_property("lost_without_an_agent", lost)
    assert all(each < NOISE for each in lost[:3])
    # Its claim still stands there: what was learned elsewhere, on the way, is forgotten.
    assert lost[3] < NOISE + RATE * LEARNED_S
    for up, end in zip(linked[:3], ends, strict=False):
        assert arrived.longest_silence_ns(up, end) < LEARNED_S * 1e9


def test_the_new_ap_answers_for_itself_at_once(domain: Lab) -> None:
    roam(domain, "client1", "ap1")
    assert ping(domain, "client1", SERVER)[0] == 1
    known_as_elsewhere(domain, "client1", "ap1")
    with stopped(domain, *domain.aps):
        domain.roam("client1", "ap2")
        assert ping(domain, "client1", str(GATEWAY))[0] == 1
    served_by(domain, "client1", "ap2")


def test_a_borrowed_address_attracts_nothing(domain: Lab) -> None:
    """Another client at another AP speaks with the address, but it has a MAC of its own."""
    roam(domain, "client1", "ap1")
    roam(domain, "client2", "ap3")
    theirs = IPv4Address(address(domain, "client1"))
    server = IPv4Address(SERVER)
    with echo(domain) as traffic, _raw(domain, "client2", RADIO) as thief:
        known_as_elsewhere(domain, "client1", "ap1")
        packet = udp(theirs, _echo_port(domain), server, _CLOSED)
        air = [domain.plan.antenna("ap3", domain.plan.networks[0]).name]
        with (
            stopped(domain, *domain.aps),
            Capture(domain.namespace("fabric"), air, touching(CLIENT_PREFIX)) as capture,
        ):
            began = time.monotonic_ns()
            for _ in range(100):
                thief.send(frame(Mac(mac(domain, "client2")), GATEWAY_MAC, packet))
                time.sleep(0.005)
            ended = time.monotonic_ns()
            received = [p for p in capture.packets() if p.frame[30:34] == theirs.packed]
    assert received == []
    assert Echoes.of(traffic.events).lost(began, ended) < NOISE


def test_late_packets_by_way_of_the_former_ap_cost_a_detour_at_most(
    domain: Lab, record_property: Callable[[str, object], None]
) -> None:
    """The anchor believes them, until the next packet; the former AP knows better."""
    roam(domain, "client1", "ap1")
    with echo(domain) as traffic, _raw(domain, "ap2", TUNNEL) as former:
        known_as_elsewhere(domain, "client1", "ap1")
        for ap in ("ap2", "ap3"):
            roam(domain, "client1", ap)
        late = udp(IPv4Address(address(domain, "client1")), 9, IPv4Address(SERVER), _CLOSED)
        sender, anchor = tunnel_mac(ApId("ap2")), tunnel_mac(ApId("ap1"))
        with Capture(domain.namespace("ap2"), [TUNNEL], touching(CLIENT_PREFIX)) as detours:
            began = time.monotonic_ns()
            for _ in range(100):
                former.send(frame(sender, anchor, late))
                time.sleep(0.005)
            ended = time.monotonic_ns()
            # Seen on their way in and on their way out; each late packet itself once.
            passed = (detours.count() - 100) // 2
    sent = round((ended - began) / 1e9 * RATE)
    record_property("detours", f"{passed} of {sent}")
    assert Echoes.of(traffic.events).lost(began, ended) < NOISE
    assert passed < sent / 2, "the next packet doesn't put it right"


def _echo_port(lab: Lab) -> int:
    """The port of the echo's socket: what else it sends goes to its anchor, too."""
    argv = ["conntrack", "-L", "-p", "udp", "--dport", str(ECHO_PORT)]
    return int(re.findall(r" sport=(\d+)", lab.run("ap1", argv).stdout)[0])


@contextlib.contextmanager
def _raw(lab: Lab, node: str, device: str) -> Iterator[socket.socket]:
    """A socket that sends whole frames."""
    with namespaces.inside(lab.namespace(node)):
        made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    with made:
        made.bind((device, 0))
        yield made
