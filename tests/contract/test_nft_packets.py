"""What the rules do to packets, on the real kernel: where each goes, and what doesn't go on."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from ipaddress import IPv4Address

import pytest

from apagent.core.domain import Ap
from apagent.core.model import Flow, FlowKey, Mac, socket_of
from apagent.kernel.linux import LinuxDataPath
from apagent.kernel.port import Change, Counters, NetworkDelta, NetworkState
from apagent.kernel.wire import Message, Netlink
from tests.contract import packets
from tests.contract.conftest import AccessPoint, run
from tests.contract.packets import ACK, REMOTE, RST, SYN, Packet, Wire, eventually
from tests.domains import ANN, ANN_IP, AP2, AP3, BEN, BEN_IP, LAN, domain, lan

pytestmark = pytest.mark.netns

DOMAIN = domain()
PEER, OTHER_PEER = DOMAIN.peers
DEVICE = "apv-lan"
GRACE_S = 0.5

OpenWire = Callable[[str], Wire]


def served_here() -> NetworkDelta:
    return NetworkDelta(known={ANN_IP: Change(None, ANN)}, neighbours={ANN_IP: Change(None, ANN)})


def routed_to(ap: Ap, *addresses: IPv4Address) -> NetworkDelta:
    return NetworkDelta(routes={address: Change(None, ap.id) for address in addresses})


def out_of_tunnel(packet: Packet, peer: Ap = PEER) -> None:
    """A peer sends a packet through the tunnel."""
    inner = packets.frame(peer.tunnel_mac, DOMAIN.me.tunnel_mac, packet)
    outer = packets.vxlan(lan().vni, peer.underlay, DOMAIN.me.underlay, inner)
    with packets.wire("others") as underlay:
        sender, to = packets.mac_of("others"), packets.mac_of("underlay")
        underlay.send(packets.frame(sender, to, outer))


def ports(wire: Wire, last: int) -> list[int]:
    """The source ports of all packets on the wire up to that of port `last`."""
    return [p.source_port for p in wire.packets_until(lambda p: p.source_port == last)]


# Sessions

WATCH = """
table ip watch {
    counter anchor1 { }
    counter anchor2 { }
    counter tracked { }
    chain c {
        type filter hook prerouting priority -100;
        iifname != "br-lan" accept
        ct state new counter name tracked
        ct state != untracked accept
        meta mark & 0xff000000 == 0x01000000 counter name anchor1
        meta mark & 0xff000000 == 0x02000000 counter name anchor2
    }
}
"""
DNS = Flow(17, ANN_IP, 0x1000, REMOTE, 0x35).key
"""What `AccessPoint.send_udp` sends."""


def counts() -> dict[str, int]:
    listed = run("nft", "list", "counters", "table", "ip", "watch")
    return {name: int(n) for name, n in re.findall(r"counter (\w+) {\s+packets (\d+)", listed)}


def counted() -> bool:
    return eventually(lambda: sum(counts().values()) > 0)


def sessions(state: NetworkState) -> NetworkDelta:
    return NetworkDelta(
        flows={flow: Change(None, anchor) for flow, anchor in state.flows.items()},
        sockets={socket: Change(None, anchor) for socket, anchor in state.sockets.items()},
    )


@pytest.mark.parametrize(
    ("state", "seen_as"),
    [
        pytest.param(NetworkState(), "tracked", id="new flow"),
        pytest.param(NetworkState(flows={DNS: AP2}), "anchor1", id="flow"),
        pytest.param(NetworkState(sockets={socket_of(DNS): AP3}), "anchor2", id="socket"),
        pytest.param(
            NetworkState(flows={DNS: AP2}, sockets={socket_of(DNS): AP3}),
            "anchor1",
            id="flow before socket",
        ),
        pytest.param(NetworkState(flows={FlowKey(DNS[:-1] + b"6"): AP2}), "tracked", id="other"),
    ],
)
def test_a_session_sends_packets_to_its_anchor(
    path: LinuxDataPath, access_point: AccessPoint, state: NetworkState, seen_as: str
) -> None:
    run("nft", "-f", "-", stdin=WATCH)
    path.apply({LAN: sessions(state)})
    access_point.send_udp(ANN, ANN_IP)
    assert counted()
    assert counts() == {"anchor1": 0, "anchor2": 0, "tracked": 0} | {seen_as: 1}


AT_HOME = NetworkDelta(home={ANN_IP: Change(None, ANN)})


def test_nothing_is_looked_up_for_a_client_at_home(
    path: LinuxDataPath, access_point: AccessPoint
) -> None:
    run("nft", "-f", "-", stdin=WATCH)
    path.apply({LAN: replace(sessions(NetworkState(flows={DNS: AP2})), home=AT_HOME.home)})
    access_point.send_udp(ANN, ANN_IP)
    assert counted()
    assert counts() == {"anchor1": 0, "anchor2": 0, "tracked": 1}


def test_somebody_else_with_its_address_is_not_at_home(
    path: LinuxDataPath, access_point: AccessPoint
) -> None:
    run("nft", "-f", "-", stdin=WATCH)
    path.apply({LAN: replace(sessions(NetworkState(flows={DNS: AP2})), home=AT_HOME.home)})
    access_point.send_udp(BEN, ANN_IP)
    assert counted()
    assert counts() == {"anchor1": 1, "anchor2": 0, "tracked": 0}


def test_a_clients_first_session_elsewhere_ends_that(
    path: LinuxDataPath, access_point: AccessPoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one transaction, and where there are several in the first."""
    run("nft", "-f", "-", stdin=WATCH)
    path.apply({LAN: AT_HOME})
    monkeypatch.setattr("apagent.kernel.nft.elements.CHANGES_PER_TRANSACTION", 2)
    done: list[list[str]] = []
    transaction = Netlink.transaction

    def record(netlink: Netlink, begin: Message, batch: Sequence[Message], end: Message) -> None:
        done.append([message.what.split()[-1] for message in batch])
        transaction(netlink, begin, batch, end)

    monkeypatch.setattr(Netlink, "transaction", record)
    other = FlowKey(DNS[:-1] + b"6")
    change = sessions(NetworkState(flows={DNS: AP2, other: AP2}))
    path.apply({LAN: replace(change, home={ANN_IP: Change(ANN, None)})})
    assert done == [["lan_home", "lan_flows"], ["lan_flows"]]
    access_point.send_udp(ANN, ANN_IP)
    assert counted()
    assert counts() == {"anchor1": 1, "anchor2": 0, "tracked": 0}


def test_an_icmp_error_of_a_client_at_home_may_speak_of_another_address(
    path: LinuxDataPath, access_point: AccessPoint, tunnel: Wire
) -> None:
    flow = Flow(17, BEN_IP, 5000, REMOTE, 53).key
    path.apply({LAN: replace(sessions(NetworkState(flows={flow: AP3})), home=AT_HOME.home)})
    about = packets.udp(REMOTE, 53, BEN_IP, 5000)
    error = packets.icmp_error(packets.PORT_UNREACHABLE, about)
    sender = error._replace(source=ANN_IP)
    access_point.send(ANN, sender)
    assert Packet.of(tunnel.frame()[14:]).source == ANN_IP


@pytest.mark.parametrize(
    ("kind", "about", "flow"),
    [
        pytest.param(
            packets.PORT_UNREACHABLE,
            packets.udp(REMOTE, 53, ANN_IP, 5000),
            Flow(17, ANN_IP, 5000, REMOTE, 53),
            id="port unreachable",
        ),
        pytest.param(
            packets.FRAGMENTATION_NEEDED,
            packets.tcp(REMOTE, 80, ACK, ANN_IP, 5000),
            Flow(6, ANN_IP, 5000, REMOTE, 80),
            id="fragmentation needed",
        ),
        pytest.param(
            packets.REASSEMBLY_TIME_EXCEEDED,
            packets.udp(REMOTE, 53, ANN_IP, 5000),
            Flow(17, ANN_IP, 5000, REMOTE, 53),
            id="time exceeded",
        ),
    ],
)
def test_a_clients_icmp_error_follows_the_flow_that_it_speaks_of(
    path: LinuxDataPath,
    access_point: AccessPoint,
    tunnel: Wire,
    kind: tuple[int, int],
    about: Packet,
    flow: Flow,
) -> None:
    run("nft", "-f", "-", stdin=WATCH)
    path.apply({LAN: sessions(NetworkState(flows={flow.key: AP3}))})
    another = about._replace(body=about.body[:2] + b"\x11\x11" + about.body[4:])
    access_point.send(ANN, packets.icmp_error(kind, another))
    error = packets.icmp_error(kind, about)
    access_point.send(ANN, error)
    sent = tunnel.frame()
    assert sent[:6] == packets.mac_bytes(OTHER_PEER.tunnel_mac)
    assert Packet.of(sent[14:]) == error._replace(ttl=error.ttl - 1)
    assert counts() == {"anchor1": 0, "anchor2": 1, "tracked": 0}


def test_an_untranslated_packet_is_dropped_and_counted(
    path: LinuxDataPath, access_point: AccessPoint
) -> None:
    run(
        "nft", "add table ip bad; add chain ip bad c { type filter hook prerouting priority -300; }"
    )
    run("nft", "add rule ip bad c notrack")
    access_point.send_udp(ANN, ANN_IP)
    assert eventually(lambda: path.counters() == Counters(leaked=1, reset=0))
    path.close()
    restarted = LinuxDataPath()
    try:
        restarted.prepare(replace(DOMAIN, networks=(replace(lan(), uplink="dsl"),)))
        assert restarted.counters() == Counters(leaked=1, reset=0)
    finally:
        restarted.close()


# The hold of a fresh table


@pytest.fixture
def fresh(access_point: AccessPoint) -> Iterator[LinuxDataPath]:
    """An AP that has just started for the first time."""
    access_point.forward_to_the_internet()
    path = LinuxDataPath()
    path.prepare(DOMAIN)
    yield path
    path.close()


def test_what_could_be_a_peers_is_held_back_until_we_are_in_sync(
    fresh: LinuxDataPath, access_point: AccessPoint, internet: Wire
) -> None:
    send = partial(access_point.send, ANN)
    send(packets.udp(ANN_IP, 5000))
    send(packets.echo_request(ANN_IP, 77))
    send(packets.tcp(ANN_IP, 5001, SYN))
    assert ports(internet, last=5001) == [5001]
    fresh.release_hold()
    send(packets.udp(ANN_IP, 5000))
    assert ports(internet, last=5000) == [5000]


def test_what_a_peer_sends_to_its_anchor_is_not_held_back(
    fresh: LinuxDataPath, internet: Wire
) -> None:
    fresh.apply({LAN: routed_to(PEER, ANN_IP)})
    out_of_tunnel(packets.udp(ANN_IP, 5000))
    assert ports(internet, last=5000) == [5000]


def test_an_adopted_table_holds_nothing_back(
    path: LinuxDataPath, access_point: AccessPoint, internet: Wire
) -> None:
    path.close()
    restarted = LinuxDataPath()
    try:
        restarted.prepare(DOMAIN)
        access_point.send(ANN, packets.udp(ANN_IP, 5000))
        assert ports(internet, last=5000) == [5000]
    finally:
        restarted.close()


# TCP in mid-connection


def test_of_a_client_that_is_known_here_it_is_reset(
    path: LinuxDataPath, access_point: AccessPoint, client: Wire, internet: Wire
) -> None:
    path.apply({LAN: served_here()})
    time.sleep(1.2 * GRACE_S)
    access_point.send(ANN, packets.tcp(ANN_IP, 5000, ACK))
    reset = client.packets_until(lambda p: True)[0]
    assert (reset.source, reset.destination) == (REMOTE, ANN_IP)
    assert reset.tcp_flags & RST
    assert path.counters() == Counters(leaked=0, reset=1)
    access_point.send(ANN, packets.tcp(ANN_IP, 5001, SYN))
    assert ports(internet, last=5001) == [5001]


@pytest.mark.parametrize("mac", [ANN, BEN])
def test_of_a_client_that_is_not_known_here_it_is_dropped(
    path: LinuxDataPath, access_point: AccessPoint, internet: Wire, mac: Mac
) -> None:
    """Its address may be known, with another MAC."""
    if mac == BEN:
        path.apply({LAN: served_here()})
    access_point.send(mac, packets.tcp(ANN_IP, 5000, ACK))
    access_point.send(mac, packets.tcp(ANN_IP, 5001, SYN))
    assert ports(internet, last=5001) == [5001]
    assert path.counters().reset == 0


def test_of_a_client_that_has_just_come_it_is_dropped_for_half_a_second(
    path: LinuxDataPath, access_point: AccessPoint, internet: Wire
) -> None:
    came = time.monotonic()
    path.apply({LAN: served_here()})
    access_point.send(ANN, packets.tcp(ANN_IP, 5000, ACK))
    access_point.send(ANN, packets.tcp(ANN_IP, 5001, SYN))
    assert ports(internet, last=5001) == [5001]
    assert path.counters().reset == 0

    def is_reset() -> bool:
        access_point.send(ANN, packets.tcp(ANN_IP, 5000, ACK))
        return path.counters().reset > 0

    assert eventually(is_reset)
    assert time.monotonic() - came > 0.9 * GRACE_S


def test_out_of_the_tunnel_it_is_reset(path: LinuxDataPath, tunnel: Wire) -> None:
    """Its sender took us for the anchor; we are not (any more)."""
    path.apply({LAN: routed_to(PEER, ANN_IP)})
    out_of_tunnel(packets.tcp(ANN_IP, 5000, ACK))
    reset = tunnel.packets_until(lambda p: True)[0]
    assert (reset.source, reset.destination) == (REMOTE, ANN_IP)
    assert reset.tcp_flags & RST
    assert path.counters() == Counters(leaked=0, reset=1)


# Packets that follow their client


def test_a_packet_follows_its_client_a_few_times_at_most(path: LinuxDataPath, tunnel: Wire) -> None:
    path.apply({LAN: routed_to(PEER, ANN_IP)})
    for port, ttl in ((1, 64), (2, 4), (3, 3), (4, 2), (5, 64)):
        out_of_tunnel(packets.udp(REMOTE, port, ANN_IP, 5000, ttl), OTHER_PEER)
    followed = tunnel.packets_until(lambda p: p.source_port == 5)
    assert [(p.source_port, p.ttl) for p in followed] == [(1, 3), (2, 3), (3, 2), (5, 3)]
    assert followed[0] == packets.udp(REMOTE, 1, ANN_IP, 5000, ttl=3)


def test_a_packet_that_has_reached_its_client_keeps_its_life(
    path: LinuxDataPath, client: Wire
) -> None:
    path.apply({LAN: served_here()})
    out_of_tunnel(packets.udp(REMOTE, 53, ANN_IP, 5000))
    assert client.packets_until(lambda p: True) == [packets.udp(REMOTE, 53, ANN_IP, 5000, ttl=63)]


# From client to client


def test_clients_of_two_aps_reach_each_other_untranslated(
    path: LinuxDataPath, access_point: AccessPoint, client: Wire, tunnel: Wire
) -> None:
    run("nft", "-f", "-", stdin=WATCH)
    path.apply({LAN: served_here()})
    path.apply({LAN: routed_to(PEER, BEN_IP)})
    there = packets.tcp(ANN_IP, 5000, ACK, BEN_IP)
    access_point.send(ANN, there)
    assert tunnel.packets_until(lambda p: True) == [there._replace(ttl=63)]
    back = packets.tcp(BEN_IP, 80, ACK, ANN_IP, 5000)
    out_of_tunnel(back)
    assert client.packets_until(lambda p: True) == [back._replace(ttl=63)]
    assert counts()["tracked"] == 0


def test_isolated_clients_of_two_aps_do_not_reach_each_other(
    path: LinuxDataPath, access_point: AccessPoint, client: Wire, tunnel: Wire
) -> None:
    path.prepare(replace(DOMAIN, networks=(replace(lan(), isolate_clients=True),)))
    path.apply({LAN: served_here()})
    path.apply({LAN: routed_to(PEER, BEN_IP)})
    path.apply({LAN: sessions(NetworkState(flows={DNS: AP2}))})
    access_point.send(ANN, packets.udp(ANN_IP, 5000, BEN_IP))
    access_point.send_udp(ANN, ANN_IP)
    assert ports(tunnel, last=0x1000) == [0x1000]
    out_of_tunnel(packets.udp(BEN_IP, 5000, ANN_IP))
    out_of_tunnel(packets.udp(REMOTE, 53, ANN_IP))
    assert ports(client, last=53) == [53]
