"""Packets that are too large for the tunnel: none of TCP, and of the others the sender is told."""

from __future__ import annotations

import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Network

import pytest

from apagent.lab.capture import Capture, touching
from apagent.lab.lab import Lab
from apagent.lab.measure import Arrivals
from apagent.lab.traffic.running import running, serving
from tests.netns.conftest import MakeLab
from tests.netns.observe import SERVER, ask, uplink
from tests.netns.packets import (
    FRAGMENTATION_NEEDED,
    GATEWAY,
    HEADERS,
    IP_MTU,
    IP_PMTUDISC_DO,
    IP_PMTUDISC_DONT,
    UNREACHABLE,
    Ends,
    Error,
    Quotation,
    error_of,
    forget_path_mtus,
    icmp_errors,
    roam,
    set_mtu,
    tcp_connection,
    udp_flow,
)

pytestmark = pytest.mark.netns

TUNNEL_MTU = 1450
TCP_HEADERS = 40
START_S, END_S = 10.0, 30.0
PATH = ("ap2", "ap1")
DWELL_S = 0.3
RTO_MS = 200
"""The kernel's shortest retransmission timeout (TCP_RTO_MIN, include/net/tcp.h)."""
NOISE_MS = 100
TCP_REPAIR, TCP_REPAIR_OPTIONS, TCPOPT_MAXSEG = 19, 22, 2
"""linux/tcp.h, include/net/tcp.h"""
SYN, ACK = 0x02, 0x10
_TCP = 14 + 20
"""Where the TCP header begins in a frame."""


@pytest.fixture(scope="module")
def domain(module_lab: MakeLab) -> Lab:
    return module_lab(aps=2, clients=1)


@pytest.fixture(autouse=True)
def at_home(domain: Lab) -> None:
    """The client begins at ap1, and nobody knows a path MTU."""
    roam(domain, "client1", "ap1")
    forget_path_mtus(domain)


@pytest.fixture
def roamed(domain: Lab) -> Iterator[Ends]:
    """A UDP flow anchored at ap1, whose client is at ap2 now."""
    with udp_flow(domain) as ends:
        roam(domain, "client1", "ap2")
        ends.exchange()
        yield ends


# --- TCP


def test_bulk_transfers_in_both_directions_do_not_stall(
    domain: Lab, record_property: Callable[[str, object], None]
) -> None:
    options = ("--size", 50_000_000, "--rate-mbit", 80)
    with (
        serving(domain),
        icmp_errors(domain, "client1") as told_client,
        icmp_errors(domain, "server") as told_server,
        running(domain, "client1", "download", SERVER, *options) as download,
        running(domain, "client1", "upload", SERVER, *options) as upload,
    ):
        assert download.wait_for("connected", START_S)["address"] == uplink("ap1")
        assert upload.wait_for("connected", START_S)["address"] == uplink("ap1")
        began = time.monotonic_ns()
        for ap in PATH:
            time.sleep(DWELL_S)
            assert [p.wait_ended(0) for p in (download, upload)] == [False, False]
            roam(domain, "client1", ap)
        time.sleep(DWELL_S)
        ended = time.monotonic_ns()
        down, up = download.result(END_S), upload.result(END_S)
        assert (told_client(), told_server()) == ([], [])
    assert (down["sha256_match"], up["sha256_match"]) == (True, True)
    stall_down = Arrivals.of(download.events).longest_silence_ns(began, ended) / 1e6
    record_property("longest_silence_download_ms", round(stall_down, 1))
    record_property("longest_silence_upload_ms", round(up["longest_gap_ms"], 1))
    assert stall_down < RTO_MS + NOISE_MS
    assert up["longest_gap_ms"] < RTO_MS + NOISE_MS


def test_every_connection_fits_the_tunnel_from_its_syn_on(domain: Lab) -> None:
    assert offered_sizes(domain) == (TUNNEL_MTU - TCP_HEADERS, TUNNEL_MTU - TCP_HEADERS)


def test_ends_that_ignore_the_segment_size_are_told_the_mtu(domain: Lab) -> None:
    with tcp_connection(domain, "client1") as opened:
        near, far = opened.client, opened.server
        ignore_segment_size(domain, "client1", "wlan0", near)
        ignore_segment_size(domain, "server", "eth0", far)
        for sender, receiver in ((near, far), (far, near)):
            bulk(sender, receiver)
            assert path_mtu(sender) == 1500
        roam(domain, "client1", "ap2")
        for sender, receiver in ((near, far), (far, near)):
            bulk(sender, receiver)
            assert path_mtu(sender) == TUNNEL_MTU


# --- UDP


def test_the_client_is_told_by_its_serving_ap(domain: Lab, roamed: Ends) -> None:
    roamed.discover_mtu(IP_PMTUDISC_DO)
    with icmp_errors(domain, "client1") as errors:
        roamed.client.send(bytes(TUNNEL_MTU - HEADERS + 1))
        told = (GATEWAY, UNREACHABLE, FRAGMENTATION_NEEDED, TUNNEL_MTU)
        assert error_of(roamed.client) == Error(*told)
        assert errors() == [Quotation(*told, roamed.inside, True)]
    assert path_mtu(roamed.client) == TUNNEL_MTU
    roamed.exchange(TUNNEL_MTU - HEADERS)


def test_the_server_is_told_by_the_anchor(domain: Lab, roamed: Ends) -> None:
    roamed.discover_mtu(IP_PMTUDISC_DO)
    with icmp_errors(domain, "server") as errors:
        roamed.server.send(bytes(TUNNEL_MTU - HEADERS + 1))
        told = (uplink("ap1"), UNREACHABLE, FRAGMENTATION_NEEDED, TUNNEL_MTU)
        assert error_of(roamed.server) == Error(*told)
        assert errors() == [Quotation(*told, roamed.outside, True)]
    assert path_mtu(roamed.server) == TUNNEL_MTU
    roamed.exchange(TUNNEL_MTU - HEADERS)


def test_without_df_everything_arrives(roamed: Ends) -> None:
    roamed.discover_mtu(IP_PMTUDISC_DONT)
    for size in (TUNNEL_MTU - HEADERS, TUNNEL_MTU - HEADERS + 1, 1500 - HEADERS, 1500):
        roamed.exchange(size)


# --- other MTUs; last, since they restart the agents


def test_a_configured_mtu_is_used_and_shown(domain: Lab) -> None:
    restart(domain, "mtu = 1400")
    assert shown(domain) == [(1400, 1360)] * 2
    assert offered_sizes(domain) == (1360, 1360)
    with udp_flow(domain) as ends:
        roam(domain, "client1", "ap2")
        ends.discover_mtu(IP_PMTUDISC_DO)
        ends.client.send(bytes(TUNNEL_MTU - HEADERS))
        assert error_of(ends.client).mtu == 1400
        ends.exchange(1400 - HEADERS)


def test_an_underlay_with_room_is_used(domain: Lab) -> None:
    for number, ap in enumerate(domain.aps, 1):
        set_mtu(domain, ap, "bh", 1600)
        set_mtu(domain, "fabric", f"bh{number}", 1600)
    set_mtu(domain, "fabric", "backhaul", 1600)
    restart(domain)
    assert shown(domain) == [(1550, 1510)] * 2
    assert offered_sizes(domain) == (1460, 1460)
    with udp_flow(domain) as ends:
        roam(domain, "client1", "ap2")
        ends.discover_mtu(IP_PMTUDISC_DO)
        ends.exchange(1500 - HEADERS)
        assert (path_mtu(ends.client), path_mtu(ends.server)) == (1500, 1500)


def restart(lab: Lab, tunnel_option: str = "") -> None:
    """Restart every agent with a line more in the table `tunnel` of its configuration."""
    for ap in lab.aps:
        lab.kill_agent(ap, signal.SIGTERM)
        lab.agents.prepare(ap)
        file = lab.agents.config_file(ap)
        text = file.read_text().replace("[tunnel]\n", f"[tunnel]\n{tunnel_option}\n")
        file.write_text(text)
        lab.agents.start(ap)
    lab.agents.wait_ready(lab.aps)


def shown(lab: Lab) -> list[tuple[int, int]]:
    """MTU and TCP segment size of the tunnel in `apctl status` of every AP."""
    found = (ask(lab, ap, "status") for ap in lab.aps)
    return [(status["tunnel_mtu"], status["tcp_mss"]) for status in found]


def path_mtu(end: socket.socket) -> int:
    """What a connected socket's route allows now."""
    return end.getsockopt(socket.IPPROTO_IP, IP_MTU)


def offered_sizes(lab: Lab) -> tuple[int, int]:
    """The MSS in the SYN that the server receives, and in the SYN and ACK that the client does."""
    to_server = touching(IPv4Network(SERVER))
    with (
        Capture(lab.namespace("server"), ["eth0"], to_server) as at_server,
        Capture(lab.namespace("client1"), ["wlan0"], to_server) as at_client,
    ):
        with tcp_connection(lab, "client1") as opened:
            used = opened.client.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
        frames = [[p.frame for p in at.packets()] for at in (at_server, at_client)]
    syn = next(frame for frame in frames[0] if tcp_flags(frame) == SYN)
    syn_ack = next(frame for frame in frames[1] if tcp_flags(frame) == SYN | ACK)
    assert maximum_segment(next(f for f in frames[1] if tcp_flags(f) == SYN)) == 1460
    assert used <= maximum_segment(syn_ack)
    return maximum_segment(syn), maximum_segment(syn_ack)


def tcp_flags(frame: bytes) -> int:
    return frame[_TCP + 13]


def maximum_segment(frame: bytes) -> int:
    """The MSS option, which Linux sends first (RFC 9293, section 3.7.1)."""
    kind, length, size = struct.unpack_from(">BBH", frame, _TCP + 20)
    assert (kind, length) == (TCPOPT_MAXSEG, 4)
    return int(size)


def ignore_segment_size(lab: Lab, node: str, interface: str, end: socket.socket) -> None:
    """Make a connected socket send segments of 1460 bytes, whatever the other end has offered.

    The kernel works its segment size out anew when the MTU has changed.
    """
    end.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    options = struct.pack("=II", TCPOPT_MAXSEG, 1460)
    end.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_OPTIONS, options)
    end.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 0)
    for mtu in (1499, 1500):
        set_mtu(lab, node, interface, mtu)
        end.sendall(bytes(10))


def bulk(sender: socket.socket, receiver: socket.socket) -> None:
    """More than fits one segment, all of which has to arrive."""
    left = 100_000
    sender.sendall(bytes(left))
    while left > 0:
        data = receiver.recv(1 << 16)
        assert data
        left -= len(data)
