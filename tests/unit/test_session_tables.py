"""The uplink session tables: who has a flow, who has a socket, what the kernel should hold."""

from __future__ import annotations

from ipaddress import IPv4Address

from apagent.core.model import Flow, socket_of
from apagent.core.session_tables import SessionTables
from tests.domains import ANN_IP, AP1, AP2, AP3, NAT, OTHER_NAT, at, tcp, udp


def tables() -> SessionTables:
    return SessionTables(AP2, [AP1, AP3])


def test_a_peers_session_is_tunnelled_to_its_anchor() -> None:
    t = tables()
    assert t.apply(AP3, {tcp(1): NAT}) == {tcp(1): NAT}
    assert t.anchor(tcp(1)) == AP3
    assert t.touched_flows == {tcp(1): None}


def test_our_own_session_is_not_tunnelled() -> None:
    t = tables()
    t.apply(AP2, {tcp(1): NAT})
    assert t.anchor(tcp(1)) is None
    assert t.desired_flows() == {}


def test_what_is_known_already_changes_nothing() -> None:
    t = tables()
    t.apply(AP3, {tcp(1): NAT})
    t.touched_flows.clear()
    assert t.apply(AP3, {tcp(1): NAT, tcp(2): None}) == {}
    assert t.touched_flows == {}


def test_a_new_translation_of_a_known_flow_is_news_but_moves_nothing() -> None:
    t = tables()
    t.apply(AP3, {tcp(1): NAT})
    t.touched_flows.clear()
    assert t.apply(AP3, {tcp(1): OTHER_NAT}) == {tcp(1): OTHER_NAT}
    assert t.touched_flows == {}
    assert t.anchor(tcp(1)) == AP3
    t.apply(AP1, {tcp(1): at(9)})
    t.touched_flows.clear()
    t.apply(AP3, {tcp(1): at(10)})
    assert t.touched_flows == {tcp(1): AP3}
    assert t.anchor(tcp(1)) == AP1


def test_the_anchor_with_the_older_claim_has_a_flow() -> None:
    t = tables()
    t.apply(AP1, {tcp(1): at(6)})
    t.apply(AP3, {tcp(1): at(5)})
    assert t.anchor(tcp(1)) == AP3
    assert t.desired_flows() == {tcp(1): AP3}
    t.apply(AP2, {tcp(1): at(4)})
    assert t.anchor(tcp(1)) is None
    assert t.desired_flows() == {}


def test_an_own_flow_is_lost_to_an_older_one() -> None:
    t = tables()
    t.apply(AP2, {tcp(1): at(6), tcp(2): at(4)})
    t.apply(AP3, {tcp(1): at(5), tcp(2): at(5)})
    assert t.lost == {tcp(1)}
    t.lost.clear()
    t.apply(AP2, {tcp(1): None})
    t.apply(AP2, {tcp(1): at(7)})
    assert t.lost == {tcp(1)}
    t.apply(AP2, {tcp(1): None})
    assert t.lost == set()


def test_the_lowest_id_has_a_flow_that_two_anchors_opened_under_one_claim() -> None:
    t = tables()
    t.apply(AP3, {tcp(1): NAT})
    t.apply(AP1, {tcp(1): OTHER_NAT})
    assert t.anchor(tcp(1)) == AP1
    t.apply(AP1, {tcp(1): None})
    assert t.anchor(tcp(1)) == AP3


def test_the_rule_counts_for_our_own_flows_too() -> None:
    t = tables()
    t.apply(AP2, {tcp(1): NAT})
    t.apply(AP3, {tcp(1): OTHER_NAT})
    assert t.anchor(tcp(1)) is None
    t.apply(AP1, {tcp(1): OTHER_NAT})
    assert t.anchor(tcp(1)) == AP1


def test_replace_gives_the_difference() -> None:
    t = tables()
    t.apply(AP3, {tcp(1): NAT, tcp(2): NAT})
    assert t.replace(AP3, {tcp(2): NAT, tcp(3): NAT}) == {tcp(1): None, tcp(3): NAT}
    assert set(t.table(AP3)) == {tcp(2), tcp(3)}


def test_a_udp_socket_stays_with_its_anchor_while_one_flow_lives() -> None:
    t = tables()
    socket = socket_of(udp(5000))
    t.apply(AP3, {udp(5000): NAT, udp(5000, remote="198.51.100.11"): NAT})
    assert t.desired_sockets() == {socket: AP3}
    t.apply(AP3, {udp(5000): None})
    assert t.desired_sockets() == {socket: AP3}
    t.apply(AP3, {udp(5000, remote="198.51.100.11"): None})
    assert t.desired_sockets() == {}


def test_a_udp_socket_that_we_translate_is_ours() -> None:
    t = tables()
    t.apply(AP1, {udp(5000): NAT})
    t.apply(AP2, {udp(5000, remote="198.51.100.11"): NAT})
    assert t.desired_sockets() == {}
    assert list(t.desired_flows().values()) == [AP1]


def test_a_port_forward_is_a_socket_and_no_flow() -> None:
    t = tables()
    forward = Flow(6, ANN_IP, 80, IPv4Address(0), 0).key
    t.apply(AP3, {forward: NAT})
    assert t.desired_sockets() == {socket_of(tcp(80)): AP3}
    assert t.desired_flows() == {}
    assert t.touched_flows == {}
    assert t.flows_of(ANN_IP.packed) == {}
    t.apply(AP2, {forward: NAT})
    assert t.desired_sockets() == {}
    assert t.lost == set()


def test_tcp_has_no_sockets() -> None:
    t = tables()
    t.apply(AP1, {tcp(5000): NAT})
    assert t.touched_sockets == {}


def test_flows_are_counted_by_client_and_anchor() -> None:
    t = tables()
    t.apply(AP1, {tcp(1): NAT, tcp(2): NAT})
    t.apply(AP2, {udp(1): NAT})
    assert t.flows_of(ANN_IP.packed) == {AP1: 2, AP2: 1}
    t.apply(AP1, {tcp(1): None, tcp(2): None})
    assert t.flows_of(ANN_IP.packed) == {AP2: 1}
    t.apply(AP2, {udp(1): None})
    assert t.flows_of(ANN_IP.packed) == {}


def test_a_client_has_sessions_in_the_maps_while_any_peer_has_one_of_it() -> None:
    t = tables()
    client = ANN_IP.packed
    t.apply(AP2, {tcp(1): NAT})
    assert not t.is_mapped(client)
    assert t.touched_clients == {}
    t.apply(AP1, {tcp(2): NAT, tcp(3): NAT})
    t.apply(AP3, {udp(4): NAT})
    assert t.is_mapped(client)
    assert t.touched_clients == {client: False}
    t.touched_clients.clear()
    t.apply(AP1, {tcp(2): None})
    assert t.touched_clients == {}
    t.apply(AP1, {tcp(3): None})
    assert t.is_mapped(client)
    t.apply(AP3, {udp(4): None})
    assert not t.is_mapped(client)
    assert t.touched_clients == {client: True}


def test_a_port_forward_at_a_peer_counts_too() -> None:
    t = tables()
    standing = Flow(6, ANN_IP, 80, IPv4Address(0), 0).key
    t.apply(AP2, {standing: NAT})
    assert not t.is_mapped(ANN_IP.packed)
    t.apply(AP3, {standing: NAT})
    assert t.is_mapped(ANN_IP.packed)
    t.apply(AP3, {standing: None})
    assert not t.is_mapped(ANN_IP.packed)


def test_when_our_flow_ends_a_peers_is_installed() -> None:
    t = tables()
    t.apply(AP2, {udp(1): at(4)})
    t.apply(AP3, {udp(1): at(5)})
    t.touched_flows.clear()
    t.touched_sockets.clear()
    t.apply(AP2, {udp(1): None})
    assert t.touched_flows == {udp(1): None}
    assert t.touched_sockets == {socket_of(udp(1)): None}
    assert t.anchor(udp(1)) == AP3
