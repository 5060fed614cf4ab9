"""The topology, computed."""

from collections import Counter
from ipaddress import IPv4Address

import pytest

from apagent.lab.errors import LabError, UnknownNode
from apagent.lab.plan import (
    CLIENT_ADDRESSES,
    CLIENT_PREFIX,
    FABRIC,
    GATEWAY,
    MAX_APS,
    MAX_CLIENTS,
    NETWORKS,
    Plan,
    plan,
)


@pytest.fixture(params=[(1, 0), (3, 2), (MAX_APS, MAX_CLIENTS)], ids=str)
def any_plan(request: pytest.FixtureRequest) -> Plan:
    return plan(*request.param)


def test_nodes() -> None:
    names = [node.name for node in plan(2, 1).nodes]
    assert names == ["internet", "server", "fabric", "ap1", "ap2", "client1"]


def test_every_ap_has_the_same_gateway_and_an_uplink_address_of_its_own() -> None:
    three = plan(3, 0)
    lans = [three.interface(ap, "br-lan") for ap in three.aps]
    assert {(lan.mac, lan.address) for lan in lans} == {("02:00:00:00:00:fe", GATEWAY)}
    uplinks = [str(three.interface(ap, "wan").address) for ap in three.aps]
    assert uplinks == ["203.0.113.11", "203.0.113.12", "203.0.113.13"]
    assert [str(three.underlay(ap)) for ap in three.aps] == ["10.99.0.1", "10.99.0.2", "10.99.0.3"]


def test_clients_start_at_the_aps_in_turn() -> None:
    some = plan(2, 3)
    bridges = [some.port(client).bridge for client in some.clients]
    first, second = some.bss("ap1").index, some.bss("ap2").index
    assert bridges == [first, second, first]
    assert [str(some.station(client).address) for client in some.clients] == [
        "10.77.1.1",
        "10.77.1.2",
        "10.77.1.3",
    ]


def test_interface_indices_are_unique_in_the_whole_lab(any_plan: Plan) -> None:
    indices = [interface.index for interface in any_plan.interfaces]
    assert len(set(indices)) == len(indices)
    assert min(indices) > 1  # lo


def test_names_are_unique_in_a_node_and_fit_the_kernel(any_plan: Plan) -> None:
    names = [(interface.node, interface.name) for interface in any_plan.interfaces]
    assert len(set(names)) == len(names)
    assert max(len(name) for _, name in names) <= 15


def test_addresses_are_unique_but_for_the_gateway(any_plan: Plan) -> None:
    seen = Counter(a.ip for interface in any_plan.interfaces for a in interface.addresses)
    assert seen.pop(GATEWAY) == len(any_plan.aps)
    assert set(seen.values()) == {1}


def test_clients_have_addresses_and_macs_of_their_own(any_plan: Plan) -> None:
    stations = [any_plan.station(client) for client in any_plan.clients]
    assert all(station.address in CLIENT_PREFIX for station in stations)
    assert len({station.mac for station in stations}) == len(stations)
    assert all(station.address != CLIENT_PREFIX.broadcast_address for station in stations)


def test_ports_are_on_bridges_of_their_own_node(any_plan: Plan) -> None:
    bridges = {bridge.index: bridge.node for bridge in any_plan.bridges}
    ports = [interface for interface in any_plan.interfaces if interface.bridge is not None]
    assert all(bridges[port.bridge or 0] == port.node for port in ports)
    assert {port.name for port in ports if port.node == FABRIC} >= {"radio1", "bh1"}


def test_default_routes_lead_to_a_neighbour(any_plan: Plan) -> None:
    for node in any_plan.nodes:
        if node.gateway is not None:
            networks = [a.network for i in any_plan.on(node.name) for a in i.addresses]
            assert any(node.gateway in network for network in networks)
    assert any_plan.node("internet").gateway is None


@pytest.mark.parametrize(
    ("aps", "clients"), [(0, 0), (-1, 2), (MAX_APS + 1, 0), (1, -1), (1, MAX_CLIENTS + 1)]
)
def test_impossible_sizes_are_refused(aps: int, clients: int) -> None:
    with pytest.raises(LabError, match="a lab has"):
        plan(aps, clients)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    small = plan(1, 1)
    with pytest.raises(UnknownNode, match="ap1, client1"):
        small.node("ap2")
    with pytest.raises(UnknownNode, match="'client1' is not an AP"):
        small.ap("client1")
    with pytest.raises(UnknownNode, match="it has client1"):
        small.client("ap1")


def test_second_server_address() -> None:
    (server,) = plan(1, 0).on("server")
    addresses = [address.ip for address in server.addresses]
    assert addresses == [IPv4Address("198.51.100.10"), IPv4Address("198.51.100.11")]


def test_clients_belong_to_two_networks_in_turn() -> None:
    both = plan(2, 3, networks=2)
    assert [both.network(client).name for client in both.clients] == ["lan", "guest", "lan"]
    assert str(both.station("client2").address) == "10.78.1.2"
    assert both.node("client2").gateway == both.interface("ap1", "br-guest").address
    guest = both.networks[1]
    assert both.port("client2").bridge == both.bss("ap2", guest).index
    assert both.bss("ap1").index != both.bss("ap1", guest).index
    with pytest.raises(LabError, match="1 to 2 client networks"):
        plan(2, 2, networks=3)


def test_all_networks_are_in_the_prefix_that_is_watched_for_leaks() -> None:
    assert all(network.prefix.subnet_of(CLIENT_ADDRESSES) for network in NETWORKS)
