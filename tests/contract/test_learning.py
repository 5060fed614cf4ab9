"""The kernel itself learns where a client is, from its packets: no agent has a part in it."""

from __future__ import annotations

import time
from dataclasses import replace
from ipaddress import IPv4Address

import pytest

from apagent.core.domain import Ap
from apagent.core.model import ApId, Mac
from apagent.core.roam import STRAGGLER_S
from apagent.kernel.linux import LinuxDataPath
from apagent.kernel.nft.sets import LEARNED_MS
from apagent.kernel.port import Change, NetworkDelta
from tests.contract import packets
from tests.contract.conftest import AccessPoint, run
from tests.contract.packets import REMOTE, Packet, Wire, eventually
from tests.contract.test_nft_packets import OTHER_PEER, PEER, out_of_tunnel
from tests.domains import ANN, ANN_IP, BEN, BEN_IP, LAN, domain, lan

pytestmark = pytest.mark.netns

DOMAIN = domain()
GATEWAY = lan().gateway
OUTSIDE = IPv4Address("203.0.113.11")
PORT = 5000
LEARNED_S = LEARNED_MS / 1000


def here(before: Ap | None = None) -> NetworkDelta:
    """We claim Ann, whom `before` served."""
    old = None if before is None else before.id
    return NetworkDelta(
        known={ANN_IP: Change(None, ANN)},
        elsewhere={} if before is None else {ANN_IP: Change(ANN, None)},
        places={} if before is None else {ANN_IP: Change(old, None)},
        routes={} if before is None else {ANN_IP: Change(old, None)},
        neighbours={ANN_IP: Change(None, ANN)},
    )


def elsewhere(ap: Ap, before: Ap | None = None) -> NetworkDelta:
    """`ap` claims Ann, whom `before` served, or nobody."""
    old = None if before is None else before.id
    return NetworkDelta(
        elsewhere={} if before else {ANN_IP: Change(None, ANN)},
        places={ANN_IP: Change(old, ap.id)},
        routes={ANN_IP: Change(old, ap.id)},
    )


def left_for(ap: Ap) -> NetworkDelta:
    """`ap` claims Ann, whom we served."""
    return replace(
        elsewhere(ap),
        known={ANN_IP: Change(ANN, None)},
        neighbours={ANN_IP: Change(ANN, None)},
    )


def resolved(address: IPv4Address, mac: Mac, device: str = "br-lan") -> None:
    """The client would answer an ARP request; these don't."""
    run("ip", "neigh", "replace", str(address), "lladdr", mac, "dev", device, "nud", "reachable")


def to_ann(port: int = 53) -> Packet:
    return packets.udp(REMOTE, port, ANN_IP, PORT)


def replied() -> None:
    """A server answers a datagram that Ann has sent from `PORT` and we have translated."""
    with packets.wire("internet") as uplink:
        sender, to = packets.mac_of("internet"), packets.mac_of("wan")
        uplink.send(packets.frame(sender, to, packets.udp(REMOTE, 53, OUTSIDE, PORT)))


def next_hop(tunnel: Wire) -> Mac:
    """The AP that the next packet in the tunnel goes to."""
    return Mac(tunnel.frame()[:6].hex(":"))


def next_ports(wire: Wire, count: int) -> list[int]:
    return [wire.packets_until(lambda _: True)[0].source_port for _ in range(count)]


# The AP that a client comes to


def test_who_speaks_here_is_answered_here(
    path: LinuxDataPath, access_point: AccessPoint, client: Wire, internet: Wire
) -> None:
    """From the tunnel, from our own uplink and from ourselves, whatever the claims still say."""
    path.apply({LAN: elsewhere(PEER)})
    resolved(ANN_IP, ANN)
    access_point.send(ANN, packets.udp(ANN_IP, PORT))
    assert internet.packets_until(lambda _: True)[0].source == OUTSIDE
    out_of_tunnel(to_ann(1), OTHER_PEER)
    replied()
    access_point.send(ANN, packets.echo_request(ANN_IP, 7, GATEWAY))
    answers = client.packets_until(lambda p: p.source == GATEWAY)
    assert [p.source_port for p in answers[:-1]] == [1, 53]


def test_an_address_alone_proves_nothing(
    path: LinuxDataPath, access_point: AccessPoint, client: Wire, tunnel: Wire
) -> None:
    """Ben speaks with Ann's address and his own MAC: he doesn't get what is hers."""
    path.apply({LAN: elsewhere(PEER)})
    resolved(ANN_IP, ANN)
    access_point.send(BEN, packets.udp(ANN_IP, PORT))
    out_of_tunnel(to_ann(1), OTHER_PEER)
    replied()
    assert [tunnel.packets_until(lambda _: True)[0].source_port for _ in "ab"] == [1, 53]
    access_point.send(ANN, packets.udp(ANN_IP, PORT))
    out_of_tunnel(to_ann(2), OTHER_PEER)
    assert next_ports(client, 1) == [2]


def test_what_was_learned_is_forgotten(
    path: LinuxDataPath, access_point: AccessPoint, client: Wire, tunnel: Wire
) -> None:
    path.apply({LAN: elsewhere(PEER)})
    resolved(ANN_IP, ANN)
    for _ in range(3):
        access_point.send(ANN, packets.udp(ANN_IP, PORT))
        time.sleep(LEARNED_S / 2)
    out_of_tunnel(to_ann(1), OTHER_PEER)
    assert next_ports(client, 1) == [1]
    time.sleep(LEARNED_S)
    out_of_tunnel(to_ann(2), OTHER_PEER)
    assert next_ports(tunnel, 1) == [2]


def test_late_packets_of_a_client_that_has_left_prove_nothing(
    path: LinuxDataPath, access_point: AccessPoint, client: Wire, tunnel: Wire
) -> None:
    path.apply({LAN: here()})
    path.apply({LAN: left_for(PEER)})
    resolved(ANN_IP, ANN)
    access_point.send(ANN, packets.udp(ANN_IP, PORT))
    out_of_tunnel(to_ann(1), OTHER_PEER)
    assert next_ports(tunnel, 1) == [1]
    time.sleep(STRAGGLER_S)
    access_point.send(ANN, packets.udp(ANN_IP, PORT))
    out_of_tunnel(to_ann(2), OTHER_PEER)
    assert next_ports(client, 1) == [2]


def test_a_claim_takes_over(
    path: LinuxDataPath, access_point: AccessPoint, client: Wire, tunnel: Wire
) -> None:
    """The client has gone on before we could claim it."""
    path.apply({LAN: elsewhere(PEER)})
    resolved(ANN_IP, ANN)
    access_point.send(ANN, packets.udp(ANN_IP, PORT))
    path.apply({LAN: elsewhere(OTHER_PEER, before=PEER)})
    replied()
    assert next_hop(tunnel) == OTHER_PEER.tunnel_mac
    access_point.send(ANN, packets.udp(ANN_IP, PORT))
    replied()
    assert next_ports(client, 1) == [53]


# The anchor


@pytest.mark.parametrize("believed", [None, OTHER_PEER], ids=["here", "at another peer"])
def test_replies_go_where_the_last_packet_came_from(
    path: LinuxDataPath, internet: Wire, tunnel: Wire, believed: Ap | None
) -> None:
    path.apply({LAN: here() if believed is None else elsewhere(believed)})
    for peer in (PEER, OTHER_PEER, PEER):
        out_of_tunnel(packets.udp(ANN_IP, PORT), peer)
        internet.frame()
        replied()
        assert next_hop(tunnel) == peer.tunnel_mac


def test_a_claim_takes_over_and_a_later_packet_overrules_it(
    path: LinuxDataPath, internet: Wire, tunnel: Wire
) -> None:
    path.apply({LAN: here()})
    out_of_tunnel(packets.udp(ANN_IP, PORT), PEER)
    internet.frame()
    path.apply({LAN: left_for(OTHER_PEER)})
    replied()
    assert next_hop(tunnel) == OTHER_PEER.tunnel_mac
    for peer in (PEER, OTHER_PEER):
        out_of_tunnel(packets.udp(ANN_IP, PORT), peer)
        internet.frame()
        replied()
        assert next_hop(tunnel) == peer.tunnel_mac


def test_a_client_that_comes_home_is_answered_at_home(
    path: LinuxDataPath, access_point: AccessPoint, client: Wire, internet: Wire, tunnel: Wire
) -> None:
    """Its packets leave from here; what was learned of it doesn't make them a peer's."""
    path.apply({LAN: elsewhere(PEER)})
    resolved(ANN_IP, ANN)
    out_of_tunnel(packets.udp(ANN_IP, PORT), OTHER_PEER)
    replied()
    assert next_hop(tunnel) == OTHER_PEER.tunnel_mac
    access_point.send(ANN, packets.udp(ANN_IP, PORT))
    assert next_ports(internet, 2) == [PORT, PORT]
    replied()
    assert next_ports(client, 1) == [53]
    path.apply({LAN: here(before=PEER)})
    replied()
    assert next_ports(client, 1) == [53]


def test_other_bits_of_the_mark_stay(path: LinuxDataPath, internet: Wire, tunnel: Wire) -> None:
    foreign = "ip daddr 10.77.0.0/16 meta mark set meta mark | 0x00000300"
    watched = "ip daddr 10.77.0.0/16 meta mark 0x01000300 counter name seen"
    run(
        "nft",
        "add table ip w; add counter ip w seen;"
        "add chain ip w a { type filter hook prerouting priority -95; };"
        f"add rule ip w a {foreign};"
        "add chain ip w b { type filter hook forward priority 0; };"
        f"add rule ip w b {watched}",
    )
    path.apply({LAN: here()})
    out_of_tunnel(packets.udp(ANN_IP, PORT), PEER)
    internet.frame()
    replied()
    assert next_hop(tunnel) == PEER.tunnel_mac
    assert "packets 1 " in run("nft", "list", "counter", "ip", "w", "seen")


def test_out_of_a_tunnel_into_it_only_routes_lead(
    path: LinuxDataPath, internet: Wire, tunnel: Wire
) -> None:
    """Else two APs that have learned of each other would play a packet to and fro."""
    path.apply({LAN: elsewhere(PEER)})
    out_of_tunnel(packets.udp(ANN_IP, PORT), OTHER_PEER)
    internet.frame()
    replied()
    assert next_hop(tunnel) == OTHER_PEER.tunnel_mac
    out_of_tunnel(to_ann(2), OTHER_PEER)
    assert next_hop(tunnel) == PEER.tunnel_mac


def test_an_unknown_sender_teaches_nothing(path: LinuxDataPath, tunnel: Wire) -> None:
    path.apply({LAN: elsewhere(PEER)})
    stranger = replace(PEER, id=ApId("ap9"), number=9)
    out_of_tunnel(packets.udp(ANN_IP, PORT), stranger)
    replied()
    assert next_hop(tunnel) == PEER.tunnel_mac


# Networks with a zone, and what lives on


def test_networks_with_a_zone_go_by_the_claims(
    path: LinuxDataPath, access_point: AccessPoint, tunnel: Wire
) -> None:
    path.prepare(replace(DOMAIN, networks=(replace(lan(), zone=7),)))
    path.apply({LAN: elsewhere(PEER)})
    resolved(ANN_IP, ANN)
    access_point.send(ANN, packets.udp(ANN_IP, PORT))
    out_of_tunnel(to_ann(1), OTHER_PEER)
    assert next_ports(tunnel, 1) == [1]


def test_the_next_run_keeps_what_was_learned(
    path: LinuxDataPath, access_point: AccessPoint, client: Wire
) -> None:
    path.apply({LAN: elsewhere(PEER)})
    resolved(ANN_IP, ANN)
    access_point.send(ANN, packets.udp(ANN_IP, PORT))
    path.close()
    restarted = LinuxDataPath()
    try:
        restarted.prepare(DOMAIN)
        out_of_tunnel(to_ann(1), OTHER_PEER)
        assert next_ports(client, 1) == [1]
    finally:
        restarted.close()


def test_its_elements_do_not_pile_up(path: LinuxDataPath, internet: Wire) -> None:
    """Each packet renews one element; it doesn't make another."""
    path.apply({LAN: here()})
    for _ in range(200):
        out_of_tunnel(packets.udp(ANN_IP, PORT), PEER)
    listed = run("nft", "list", "map", "inet", "apagent", "learned")
    assert listed.count(str(ANN_IP)) == 1
    assert eventually(
        lambda: "elements" not in run("nft", "list", "map", "inet", "apagent", "learned")
    )


def test_who_is_known_here_teaches_nothing(
    path: LinuxDataPath, access_point: AccessPoint, internet: Wire
) -> None:
    path.apply({LAN: replace(here(), known={ANN_IP: Change(None, ANN), BEN_IP: Change(None, BEN)})})
    for mac, address in ((ANN, ANN_IP), (BEN, BEN_IP)):
        access_point.send(mac, packets.udp(address, PORT))
        internet.frame()
    assert "elements" not in run("nft", "list", "map", "inet", "apagent", "learned")
