"""Packets that are under way while APs disagree on where a client is, and flows at every AP."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Callable
from ipaddress import IPv4Network

import pytest

from apagent.core.domain import tunnel_address
from apagent.core.model import ApId
from apagent.kernel.nft.forwarding import FOLLOW_TTL
from apagent.lab.capture import Capture, touching
from apagent.lab.lab import Lab
from apagent.lab.plan import CLIENT_PREFIX
from tests.netns.conftest import MakeLab
from tests.netns.early_flows import known_to, stopped
from tests.netns.nat_support import (
    accepted,
    exchange,
    known_everywhere,
    listening,
    roam,
    tcp,
    udp,
)
from tests.netns.observe import SERVER, address, served_by, uplink

pytestmark = pytest.mark.netns

TUNNEL = "apv-lan"
TUNNEL_RANGE = IPv4Network("100.127.0.0/16")
HOST_TABLE = 77000
IP_RECVTTL = 12
"""linux/in.h; the socket module doesn't name it."""
FULL_TTL = 64


@pytest.fixture(scope="module")
def domain(module_lab: MakeLab) -> Lab:
    return module_lab(aps=3, clients=1)


def receive_with_ttl(sock: socket.socket) -> tuple[bytes, int]:
    """A datagram, and the TTL that it arrived with."""
    data, ancillary, _, _ = sock.recvmsg(2000, 100)
    return data, struct.unpack("=i", ancillary[0][2])[0]


# Packets under way


def test_packets_follow_a_client_that_has_left(domain: Lab) -> None:
    """The anchor doesn't know of the roam yet: what it sends to the old AP goes on to the new.

    Until the client has spoken: that is news for the anchor's kernel.
    """
    roam(domain, "client1", "ap1")
    with udp(domain, "server", SERVER, 0) as server, udp(domain, "client1") as client:
        client.setsockopt(socket.IPPROTO_IP, IP_RECVTTL, 1)
        client.sendto(b"hello", server.getsockname())
        _, source = server.recvfrom(100)
        assert source[0] == uplink("ap1")
        known_everywhere(domain, "--client", address(domain, "client1"))
        roam(domain, "client1", "ap2")
        with stopped(domain, "ap1"):
            domain.roam("client1", "ap3")
            known_to(domain, "client1", "ap3", "ap2", "ap3")
            server.sendto(b"by way of the old AP", source)
            data, ttl = receive_with_ttl(client)
            assert data == b"by way of the old AP"
            assert ttl < FOLLOW_TTL, "it came straight"
            client.sendto(b"from the new AP", server.getsockname())
            assert server.recvfrom(100) == (b"from the new AP", source)
            server.sendto(b"straight", source)
            data, ttl = receive_with_ttl(client)
            assert data == b"straight"
            assert ttl > FULL_TTL - 10
        served_by(domain, "client1", "ap3")


def test_a_packet_cannot_go_round_in_circles(
    domain: Lab, record_property: Callable[[str, object], None]
) -> None:
    """Two APs each believe that the other serves the client; a third one sends a packet."""
    roam(domain, "client1", "ap1")
    with udp(domain, "server", SERVER, 0) as server, udp(domain, "client1") as client:
        client.sendto(b"hello", server.getsockname())
        _, source = server.recvfrom(100)
        known_everywhere(domain, "--client", address(domain, "client1"))
        roam(domain, "client1", "ap2")
        with stopped(domain, *domain.aps):
            _send_by_way_of(domain, "ap2", "client1", "ap3")
            _send_by_way_of(domain, "ap3", "client1", "ap2")
            crossings = _crossings(domain, lambda: server.sendto(b"around", source))
            domain.run("ap2", _route("del", domain, "client1"))
            _send_by_way_of(domain, "ap3", "client1", "ap2")
    record_property("crossings", crossings)
    # From the anchor to the first of the two, and FOLLOW_TTL lets it go on one time less.
    assert crossings == FOLLOW_TTL


def _send_by_way_of(lab: Lab, ap: str, client: str, other: str) -> None:
    via = str(tunnel_address(ApId(other), TUNNEL_RANGE))
    lab.run(
        ap, [*_route("replace", lab, client), "via", via, "dev", TUNNEL, "onlink", "proto", "176"]
    )


def _route(verb: str, lab: Lab, client: str) -> list[str]:
    return ["ip", "route", verb, f"{address(lab, client)}/32", "table", str(HOST_TABLE)]


def _crossings(lab: Lab, send: Callable[[], object]) -> int:
    """How many tunnels the one packet went through that `send` sends."""
    with contextlib.ExitStack() as stack:
        watched = [
            stack.enter_context(Capture(lab.namespace(ap), [TUNNEL], touching(CLIENT_PREFIX)))
            for ap in lab.aps
        ]
        send()
        counts = [0]
        while sum(counts) == 0 or counts[-1] != counts[-2]:
            time.sleep(0.1)
            counts.append(sum(capture.count() for capture in watched))
    # A tunnel shows it twice: where it goes in and where it comes out.
    return counts[-1] // 2


# Flows at every AP


def test_a_client_that_returns_home_keeps_what_it_opened_on_its_way(domain: Lab) -> None:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(listening(domain, "server", SERVER))
        opened = []
        for ap in ("ap1", "ap2", "ap3"):
            roam(domain, "client1", ap)
            near = stack.enter_context(tcp(domain, "client1", listener.getsockname()))
            far, (source, _) = accepted(listener)
            stack.enter_context(far)
            assert source == uplink(ap)
            opened.append((near, far))
            known_everywhere(domain, "--protocol", "tcp", at_least=len(opened))
        for ap in ("ap1", "ap3", "ap2", "ap1"):
            roam(domain, "client1", ap)
            for near, far in opened:
                exchange(near, far)
