"""Where packets go whose anchor is dead, and those of new flows, on the real kernel."""

from __future__ import annotations

import struct
import time
from functools import partial
from ipaddress import IPv4Address, IPv6Address

import pytest

from apagent.core.desired import ANY_ANCHOR, NOBODY, difference
from apagent.core.model import ApId, Flow, FlowKey
from apagent.kernel.linux import LinuxDataPath
from apagent.kernel.port import Counters, NetworkState
from tests.contract import packets
from tests.contract.conftest import GATEWAY_MAC, AccessPoint, run
from tests.contract.packets import ACK, REMOTE, RST, SYN, Packet, Wire, eventually
from tests.contract.test_nft_packets import (
    DOMAIN,
    GRACE_S,
    OTHER_PEER,
    PEER,
    WATCH,
    counted,
    counts,
    out_of_tunnel,
    ports,
    served_here,
)
from tests.domains import ANN, ANN_IP, AP2, AP3, BEN_IP, LAN

pytestmark = pytest.mark.netns

OUTSIDE = IPv4Address("203.0.113.11")
MDNS = IPv4Address("224.0.0.251")
BROADCAST = IPv4Address("255.255.255.255")
MSS_1460 = b"\x02\x04\x05\xb4"


@pytest.fixture
def path(path: LinuxDataPath) -> LinuxDataPath:
    """The data path of an AP that serves Ann, who has just come."""
    path.apply({LAN: served_here()})
    return path


def install(
    path: LinuxDataPath,
    diverted: dict[ApId, ApId],
    flows: dict[FlowKey, ApId] | None = None,
) -> None:
    path.apply({LAN: difference(NetworkState(), NetworkState(flows or {}, diverted=diverted))})


def udp_flow(port: int) -> FlowKey:
    return Flow(17, ANN_IP, port, REMOTE, 53).key


# New flows that another AP anchors


@pytest.mark.parametrize(
    "packet",
    [
        packets.udp(ANN_IP, 5000),
        packets.tcp(ANN_IP, 5000, SYN),
        packets.tcp(ANN_IP, 5000, ACK),
        packets.echo_request(ANN_IP, 5000),
    ],
    ids=["UDP", "TCP", "TCP in mid-connection, perhaps known there already", "echo"],
)
def test_what_no_map_knows_goes_to_the_anchor_of_new_flows(
    path: LinuxDataPath, access_point: AccessPoint, tunnel: Wire, packet: Packet
) -> None:
    install(path, {ANY_ANCHOR: AP3})
    time.sleep(1.2 * GRACE_S)
    access_point.send(ANN, packet)
    sent = tunnel.frame()
    assert sent[:6] == packets.mac_bytes(OTHER_PEER.tunnel_mac)
    assert Packet.of(sent[14:]) == packet._replace(ttl=63)


def test_without_a_way_to_the_internet_too(
    path: LinuxDataPath, access_point: AccessPoint, tunnel: Wire
) -> None:
    install(path, {ANY_ANCHOR: AP3})
    run("ip", "route", "del", "default")
    access_point.send(ANN, packets.udp(ANN_IP, 5000))
    assert ports(tunnel, last=5000) == [5000]


def test_our_own_flows_and_those_of_others_go_where_they_went(
    path: LinuxDataPath, access_point: AccessPoint, tunnel: Wire, internet: Wire
) -> None:
    install(
        path,
        {ANY_ANCHOR: AP3},
        {udp_flow(5000): DOMAIN.me.id, udp_flow(5001): AP2, udp_flow(5002): AP3},
    )
    for port in (5000, 5001, 5002):
        access_point.send(ANN, packets.udp(ANN_IP, port))
    tunnelled = [tunnel.frame() for _ in range(2)]
    assert [frame[:6] for frame in tunnelled] == [
        packets.mac_bytes(peer.tunnel_mac) for peer in (PEER, OTHER_PEER)
    ]
    [kept] = internet.packets_until(lambda _: True)
    assert (kept.source, kept.source_port) == (OUTSIDE, 5000)


@pytest.mark.parametrize("to", [IPv4Address("10.77.0.1"), OUTSIDE, MDNS, BROADCAST])
def test_what_is_for_the_ap_itself_stays_here(
    path: LinuxDataPath, access_point: AccessPoint, tunnel: Wire, to: IPv4Address
) -> None:
    run("nft", "-f", "-", stdin=WATCH)
    install(path, {ANY_ANCHOR: AP2})
    access_point.send(ANN, packets.udp(ANN_IP, 5000, to))
    assert counted()
    assert counts() == {"anchor1": 0, "anchor2": 0, "tracked": 1}
    access_point.send(ANN, packets.udp(ANN_IP, 5001))
    assert ports(tunnel, last=5001) == [5001]


def test_clients_among_themselves_are_left_alone(
    path: LinuxDataPath, access_point: AccessPoint, tunnel: Wire
) -> None:
    install(path, {ANY_ANCHOR: AP3})
    route = difference(NetworkState(), NetworkState(routes={BEN_IP: AP2}))
    path.apply({LAN: route})
    access_point.send(ANN, packets.udp(ANN_IP, 5000, BEN_IP))
    assert tunnel.frame()[:6] == packets.mac_bytes(PEER.tunnel_mac)


def test_tcp_in_mid_connection_of_a_client_that_has_just_come_is_dropped(
    path: LinuxDataPath, access_point: AccessPoint, tunnel: Wire
) -> None:
    """Its session may be on its way, and it isn't the other AP's then."""
    install(path, {ANY_ANCHOR: AP3})
    send = partial(access_point.send, ANN)
    send(packets.tcp(ANN_IP, 5000, ACK))
    send(packets.tcp(BEN_IP, 5001, ACK))
    send(packets.tcp(ANN_IP, 5002, SYN))
    assert ports(tunnel, last=5002) == [5002]
    assert path.counters().reset == 0


def test_ipv6_is_not_ours(path: LinuxDataPath, client: Wire) -> None:
    run("nft", "-f", "-", stdin=WATCH.replace("table ip ", "table ip6 "))
    for device in ("br-lan", "wan"):
        run("sysctl", "-qw", f"net.ipv6.conf.{device}.disable_ipv6=0")
    run("ip", "-6", "route", "add", "default", "dev", "wan")
    install(path, {ANY_ANCHOR: AP3})
    addresses = IPv6Address("2001:db8::a").packed + IPv6Address("2001:db8::b").packed
    ports_and_size = struct.pack(">HHH", 5000, 53, 8)
    total = packets.checksum(addresses + ports_and_size + struct.pack(">HHH", 0, 17, 8))
    ipv6 = struct.pack(">IHBB", 6 << 28, 8, 17, 64) + addresses
    header = packets.mac_bytes(GATEWAY_MAC) + packets.mac_bytes(ANN) + b"\x86\xdd"
    client.send(header + ipv6 + ports_and_size + struct.pack(">H", total))
    assert eventually(lambda: "packets 1 " in run("nft", "list", "table", "ip6", "watch"))
    listed = run("nft", "list", "counter", "ip6", "watch", "tracked")
    assert "packets 1 " in listed


# Anchors that are diverted


def test_a_dead_anchors_flows_go_to_its_successor(
    path: LinuxDataPath, access_point: AccessPoint, tunnel: Wire
) -> None:
    install(path, {AP2: AP3}, {udp_flow(5000): AP2})
    access_point.send(ANN, packets.udp(ANN_IP, 5000))
    assert tunnel.frame()[:6] == packets.mac_bytes(OTHER_PEER.tunnel_mac)


def test_a_dead_anchors_flows_without_successor_are_reset_or_anchored_here(
    path: LinuxDataPath, access_point: AccessPoint, client: Wire, internet: Wire
) -> None:
    tcp_flow = Flow(6, ANN_IP, 5001, REMOTE, 80).key
    install(path, {AP2: NOBODY}, {udp_flow(5000): AP2, tcp_flow: AP2})
    time.sleep(1.2 * GRACE_S)
    access_point.send(ANN, packets.tcp(ANN_IP, 5001, ACK))
    [reset] = client.packets_until(lambda _: True)
    assert reset.tcp_flags & RST
    access_point.send(ANN, packets.udp(ANN_IP, 5000))
    [translated] = internet.packets_until(lambda _: True)
    assert (translated.source, translated.source_port) == (OUTSIDE, 5000)


# At the AP that anchors others' new flows


def test_a_flow_that_opens_out_of_the_tunnel_is_anchored_here(
    path: LinuxDataPath, internet: Wire, tunnel: Wire
) -> None:
    served_there = NetworkState(routes={BEN_IP: AP2})
    path.apply({LAN: difference(NetworkState(), served_there)})
    out_of_tunnel(packets.tcp(BEN_IP, 5000, SYN, options=MSS_1460))
    [syn] = internet.packets_until(lambda _: True)
    assert (syn.source, syn.source_port) == (OUTSIDE, 5000)
    assert syn.body[20:] == b"\x02\x04" + DOMAIN.mss.to_bytes(2, "big")
    acknowledged = packets.TCP_SEQUENCE + 1
    answer = packets.tcp(REMOTE, 80, SYN | ACK, OUTSIDE, 5000, acknowledged=acknowledged)
    internet.send(packets.frame(packets.mac_of("internet"), packets.mac_of("wan"), answer))
    [answered] = tunnel.packets_until(lambda _: True)
    assert (answered.source, answered.destination) == (REMOTE, BEN_IP)
    assert path.counters() == Counters(0, 0)


@pytest.mark.parametrize("packet", [packets.udp(BEN_IP, 5000), packets.echo_request(BEN_IP, 5000)])
def test_so_are_datagrams_and_echoes(path: LinuxDataPath, internet: Wire, packet: Packet) -> None:
    path.apply({LAN: difference(NetworkState(), NetworkState(routes={BEN_IP: AP2}))})
    out_of_tunnel(packet)
    [translated] = internet.packets_until(lambda _: True)
    assert translated.source == OUTSIDE
