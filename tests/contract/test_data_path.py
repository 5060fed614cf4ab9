"""The contract of a `DataPath`, kept by the fake and by the real kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from itertools import pairwise

import pytest

from apagent.core.desired import ANY_ANCHOR, NOBODY, difference
from apagent.core.domain import Domain
from apagent.core.model import TCP, UDP, ApId, Mac, NetworkName, packed_socket, socket_of
from apagent.errors import KernelFault
from apagent.kernel.linux import LinuxDataPath
from apagent.kernel.port import Change, Counters, DataPath, NetworkDelta, NetworkState
from tests.domains import ANN, ANN_IP, AP2, AP3, BEN, BEN_IP, LAN, domain, lan, takeover, tcp, udp
from tests.fakes.kernel import FakeDataPath, FakeKernel

DOMAIN = domain()
ECHO = tcp(7)[:8] + b"\x01" + tcp(7)[9:11] + bytes(2)
FLOWS = (tcp(1000), udp(2000), type(tcp(7))(ECHO))
SOCKET = socket_of(udp(2000))

Open = Callable[[], DataPath]


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.netns)])
def open_path(request: pytest.FixtureRequest) -> Iterator[Open]:
    """Opens adapters on one kernel, as successive runs of an agent do."""
    if request.param == "real":
        request.getfixturevalue("access_point")
    kernel = FakeKernel()
    opened: list[DataPath] = []

    def open_() -> DataPath:
        for former in opened:
            former.close()
        opened[:] = [FakeDataPath(kernel) if request.param == "fake" else LinuxDataPath()]
        return opened[0]

    yield open_
    for path in opened:
        path.close()


@pytest.fixture
def path(open_path: Open) -> DataPath:
    """A prepared data path."""
    path = open_path()
    path.prepare(DOMAIN)
    return path


def arrivals() -> NetworkDelta:
    """Ann is served here, Ben by ap2, and each has a few flows."""
    return NetworkDelta(
        flows={flow: Change(None, AP2) for flow in FLOWS},
        sockets={SOCKET: Change(None, AP3)},
        known={BEN_IP: Change(None, BEN)},
        home={BEN_IP: Change(None, BEN)},
        elsewhere={BEN_IP: Change(None, BEN)},
        places={BEN_IP: Change(None, AP2)},
        routes={BEN_IP: Change(None, AP2)},
        neighbours={ANN_IP: Change(None, ANN)},
    )


def arrived() -> NetworkState:
    return NetworkState(
        flows=dict.fromkeys(FLOWS, AP2),
        sockets={SOCKET: AP3},
        known={BEN_IP: BEN},
        home={BEN_IP: BEN},
        elsewhere={BEN_IP: BEN},
        places={BEN_IP: AP2},
        routes={BEN_IP: AP2},
        neighbours={ANN_IP: ANN},
    )


def test_a_prepared_data_path_is_empty(path: DataPath) -> None:
    assert path.read() == {LAN: NetworkState()}
    assert path.counters() == Counters(0, 0)


def test_nothing_is_read_or_applied_before_prepare(open_path: Open) -> None:
    path = open_path()
    with pytest.raises(RuntimeError, match="prepare"):
        path.read()
    with pytest.raises(RuntimeError, match="prepare"):
        path.apply({LAN: arrivals()})


def test_what_is_applied_is_read(path: DataPath) -> None:
    path.apply({LAN: arrivals()})
    assert path.read() == {LAN: arrived()}


def test_values_are_replaced(path: DataPath) -> None:
    path.apply({LAN: arrivals()})
    path.apply(
        {
            LAN: NetworkDelta(
                flows={flow: Change(AP2, AP3) for flow in FLOWS},
                sockets={SOCKET: Change(AP3, AP2)},
                elsewhere={BEN_IP: Change(BEN, ANN)},
                places={BEN_IP: Change(AP2, AP3)},
                routes={BEN_IP: Change(AP2, AP3)},
                neighbours={ANN_IP: Change(ANN, BEN)},
            )
        }
    )
    state = path.read()[LAN]
    assert state.flows == dict.fromkeys(FLOWS, AP3)
    assert state.sockets == {SOCKET: AP2}
    assert state.elsewhere == {BEN_IP: ANN}
    assert state.places == {BEN_IP: AP3}
    assert state.routes == {BEN_IP: AP3}
    assert state.neighbours == {ANN_IP: BEN}
    assert state.known == state.home == {BEN_IP: BEN}


def test_values_are_deleted(path: DataPath) -> None:
    path.apply({LAN: arrivals()})
    path.apply(
        {
            LAN: NetworkDelta(
                flows={flow: Change(AP2, None) for flow in FLOWS},
                sockets={SOCKET: Change(AP3, None)},
                known={BEN_IP: Change(BEN, None)},
                home={BEN_IP: Change(BEN, None)},
                elsewhere={BEN_IP: Change(BEN, None)},
                places={BEN_IP: Change(AP2, None)},
                routes={BEN_IP: Change(AP2, None)},
                neighbours={ANN_IP: Change(ANN, None)},
            )
        }
    )
    assert path.read() == {LAN: NetworkState()}


def test_our_own_flows_may_stand_in_the_maps(path: DataPath) -> None:
    """So that they aren't taken for new ones while another AP anchors those."""
    own = dict.fromkeys(FLOWS, DOMAIN.me.id)
    path.apply(
        {
            LAN: NetworkDelta(
                flows={flow: Change(None, DOMAIN.me.id) for flow in own},
                sockets={SOCKET: Change(None, DOMAIN.me.id)},
            )
        }
    )
    assert path.read() == {LAN: NetworkState(flows=own, sockets={SOCKET: DOMAIN.me.id})}


DIVERTED: list[dict[ApId, ApId]] = [
    {},
    {AP2: AP3},
    {AP2: NOBODY, AP3: AP2},
    {ANY_ANCHOR: AP2},
    {ANY_ANCHOR: AP3, AP2: AP3},
]


@pytest.mark.parametrize("before", DIVERTED)
@pytest.mark.parametrize("after", DIVERTED)
def test_anchors_are_diverted(
    path: DataPath, before: dict[ApId, ApId], after: dict[ApId, ApId]
) -> None:
    states = [NetworkState(diverted=diverted) for diverted in ({}, before, after, {})]
    for old, new in pairwise(states):
        path.apply({LAN: difference(old, new)})
        assert path.read() == {LAN: new}


def test_a_restarted_agent_finds_diverted_anchors(open_path: Open, path: DataPath) -> None:
    diverted = {AP2: NOBODY, ANY_ANCHOR: AP3}
    path.apply({LAN: difference(NetworkState(), NetworkState(diverted=diverted))})
    restarted = open_path()
    assert restarted.anchor_numbers(DOMAIN.table) == {AP2: 1, AP3: 2}
    restarted.prepare(DOMAIN)
    assert restarted.read() == {LAN: NetworkState(diverted=diverted)}


TAKEOVER = domain(networks=(takeover(),))
OURS, THEIRS = IPv4Address("203.0.113.21"), IPv4Address("203.0.113.22")


def test_new_flows_get_another_source(open_path: Open) -> None:
    path = open_path()
    path.prepare(TAKEOVER)
    states = [NetworkState(sources=s) for s in ({}, {"wan": OURS}, {"wan": THEIRS}, {})]
    for old, new in pairwise(states):
        path.apply({LAN: difference(old, new)})
        assert path.read() == {LAN: new}


def test_nat_addresses_come_and_go(open_path: Open) -> None:
    path = open_path()
    path.prepare(TAKEOVER)
    both = {OURS: True, THEIRS: True}
    for old, new in pairwise([{}, {OURS: True}, both, {THEIRS: True}, {}]):
        path.apply({LAN: difference(NetworkState(addresses=old), NetworkState(addresses=new))})
        assert path.read() == {LAN: NetworkState(addresses=new)}


def test_two_networks_have_nat_addresses_of_their_own(open_path: Open) -> None:
    zoo = NetworkName("zoo")
    other = replace(takeover(zoo), prefix=IPv4Network("10.78.0.0/16"), vni=78)
    path = open_path()
    path.prepare(domain(networks=(takeover(), other)))
    path.apply(
        {
            LAN: NetworkDelta(addresses={OURS: Change(None, new=True)}),
            zoo: NetworkDelta(addresses={THEIRS: Change(None, new=True)}),
        }
    )
    assert path.read() == {
        LAN: NetworkState(addresses={OURS: True}),
        zoo: NetworkState(addresses={THEIRS: True}),
    }


def test_what_is_as_wanted_may_be_wanted_again(open_path: Open) -> None:
    path = open_path()
    path.prepare(TAKEOVER)
    path.apply({LAN: NetworkDelta(addresses={THEIRS: Change(old=True, new=None)})})
    for _ in range(2):
        path.apply({LAN: NetworkDelta(addresses={OURS: Change(None, new=True)})})
    assert path.read() == {LAN: NetworkState(addresses={OURS: True})}


def test_a_restarted_agent_finds_sources_and_nat_addresses(open_path: Open) -> None:
    path = open_path()
    path.prepare(TAKEOVER)
    delta = NetworkDelta(
        sources={"wan": Change(None, OURS)}, addresses={THEIRS: Change(None, new=True)}
    )
    path.apply({LAN: delta})
    path = open_path()
    path.prepare(TAKEOVER)
    assert path.read() == {LAN: NetworkState(sources={"wan": OURS}, addresses={THEIRS: True})}


def test_sources_and_nat_addresses_go_with_takeover(open_path: Open) -> None:
    path = open_path()
    path.prepare(TAKEOVER)
    delta = NetworkDelta(
        sources={"wan": Change(None, OURS)}, addresses={THEIRS: Change(None, new=True)}
    )
    path.apply({LAN: delta})
    path = open_path()
    path.prepare(DOMAIN)
    assert path.read() == {LAN: NetworkState()}


WEB, OTHER_WEB = packed_socket(OURS, TCP, 8080), packed_socket(THEIRS, TCP, 8080)
PHONE = packed_socket(OURS, UDP, 5060)
ANNS, BENS = packed_socket(ANN_IP, TCP, 80), packed_socket(BEN_IP, TCP, 80)
ANNS_PHONE = packed_socket(ANN_IP, UDP, 5061)


def test_port_forwards_come_change_and_go(open_path: Open) -> None:
    path = open_path()
    path.prepare(TAKEOVER)
    for old, new in pairwise(
        [
            {},
            {WEB: ANNS},
            {WEB: ANNS, OTHER_WEB: ANNS, PHONE: ANNS_PHONE},
            {WEB: BENS, PHONE: ANNS_PHONE},
            {},
        ]
    ):
        path.apply({LAN: difference(NetworkState(forwards=old), NetworkState(forwards=new))})
        assert path.read() == {LAN: NetworkState(forwards=new)}


def test_a_restarted_agent_finds_port_forwards(open_path: Open) -> None:
    path = open_path()
    path.prepare(TAKEOVER)
    path.apply({LAN: NetworkDelta(forwards={OTHER_WEB: Change(None, ANNS)})})
    path = open_path()
    path.prepare(TAKEOVER)
    assert path.read() == {LAN: NetworkState(forwards={OTHER_WEB: ANNS})}
    assert path.read(session_maps=False) == path.read()


def test_port_forwards_that_move_go_with_takeover(open_path: Open) -> None:
    path = open_path()
    path.prepare(TAKEOVER)
    path.apply({LAN: NetworkDelta(forwards={OTHER_WEB: Change(None, ANNS)})})
    path = open_path()
    path.prepare(DOMAIN)
    assert path.read() == {LAN: NetworkState()}


def test_a_roam_swaps_route_and_neighbour(path: DataPath) -> None:
    path.apply({LAN: arrivals()})
    path.apply(
        {
            LAN: NetworkDelta(
                known={BEN_IP: Change(BEN, None), ANN_IP: Change(None, ANN)},
                elsewhere={BEN_IP: Change(BEN, None), ANN_IP: Change(None, ANN)},
                places={BEN_IP: Change(AP2, None), ANN_IP: Change(None, AP3)},
                routes={BEN_IP: Change(AP2, None), ANN_IP: Change(None, AP3)},
                neighbours={BEN_IP: Change(None, BEN), ANN_IP: Change(ANN, None)},
            )
        }
    )
    state = path.read()[LAN]
    assert (state.routes, state.neighbours) == ({ANN_IP: AP3}, {BEN_IP: BEN})
    assert state.known == {ANN_IP: ANN}
    assert (state.elsewhere, state.places) == ({ANN_IP: ANN}, {ANN_IP: AP3})


def test_many_clients_at_once(path: DataPath) -> None:
    addresses = [IPv4Address("10.77.4.0") + i for i in range(1200)]
    macs = {a: Mac(f"02:00:00:01:{i >> 8:02x}:{i & 255:02x}") for i, a in enumerate(addresses)}
    path.apply(
        {
            LAN: NetworkDelta(
                routes={address: Change(None, AP2) for address in addresses},
                neighbours={address: Change(None, mac) for address, mac in macs.items()},
            )
        }
    )
    state = path.read()[LAN]
    assert state.routes == dict.fromkeys(addresses, AP2)
    assert state.neighbours == macs


def test_what_is_gone_already_may_be_removed(path: DataPath) -> None:
    delta = NetworkDelta(routes={BEN_IP: Change(AP2, None)}, neighbours={ANN_IP: Change(ANN, None)})
    path.apply({LAN: delta})
    assert path.read() == {LAN: NetworkState()}


def test_after_a_fault_read_leads_back(path: DataPath) -> None:
    path.apply({LAN: arrivals()})
    wrong = NetworkDelta(
        flows={tcp(9): Change(AP2, None), tcp(10): Change(None, AP3)},
        neighbours={BEN_IP: Change(None, BEN)},
    )
    with pytest.raises(KernelFault):
        path.apply({LAN: wrong})
    state = path.read()[LAN]
    assert state.flows.items() >= arrived().flows.items()
    assert state.neighbours.items() >= arrived().neighbours.items()
    repair = NetworkDelta(
        flows={tcp(10): Change(None, AP3)} if tcp(10) not in state.flows else {},
        neighbours={BEN_IP: Change(None, BEN)} if BEN_IP not in state.neighbours else {},
    )
    path.apply({LAN: repair})
    state = path.read()[LAN]
    assert state.flows == {**arrived().flows, tcp(10): AP3}
    assert state.neighbours == {ANN_IP: ANN, BEN_IP: BEN}


def test_a_restarted_agent_finds_everything(open_path: Open, path: DataPath) -> None:
    path.apply({LAN: arrivals()})
    restarted = open_path()
    assert restarted.anchor_numbers(DOMAIN.table) == {AP2: 1, AP3: 2}
    restarted.prepare(DOMAIN)
    assert restarted.read() == {LAN: arrived()}


def test_no_table_no_anchor_numbers(open_path: Open) -> None:
    assert open_path().anchor_numbers(DOMAIN.table) == {}


def test_what_leads_to_a_former_peer_can_be_removed(open_path: Open, path: DataPath) -> None:
    path.apply({LAN: arrivals()})
    path = open_path()
    path.prepare(replace(DOMAIN, peers=DOMAIN.peers[1:]))
    state = path.read()[LAN]
    assert state.routes == {}
    assert state.sockets == {SOCKET: AP3}
    assert not {AP2, AP3} & set(state.flows.values())
    assert set(state.places.values()).isdisjoint({AP2, AP3})
    gone = NetworkDelta(
        flows={flow: Change(ap, None) for flow, ap in state.flows.items()},
        places={address: Change(ap, None) for address, ap in state.places.items()},
    )
    path.apply({LAN: gone})
    assert (path.read()[LAN].flows, path.read()[LAN].places) == ({}, {})


def test_a_second_network_comes_and_goes(open_path: Open, path: DataPath) -> None:
    path.apply({LAN: arrivals()})
    two = replace(DOMAIN, networks=(lan(), replace(lan("zoo", "10.78.0.0/16", 78))))
    path = open_path()
    path.prepare(two)
    guests = NetworkDelta(routes={IPv4Address("10.78.0.9"): Change(None, AP3)})
    path.apply({NetworkName("zoo"): guests})
    assert path.read()[NetworkName("zoo")].routes == {IPv4Address("10.78.0.9"): AP3}
    path = open_path()
    path.prepare(DOMAIN)
    assert path.read() == {LAN: arrived()}


def test_forgetting_an_unknown_client_is_no_fault(path: DataPath) -> None:
    path.forget_client(LAN, ANN, [ANN_IP])
    path.forget_client(LAN, BEN, [])


def test_a_client_may_be_welcomed_twice(path: DataPath) -> None:
    for _ in range(2):
        path.welcome_client(LAN, ANN, [ANN_IP], [BEN_IP])
    path.welcome_client(LAN, BEN, [], [])
    assert path.read() == {LAN: NetworkState()}


def test_the_hold_is_released_once_and_stays_released(open_path: Open, path: DataPath) -> None:
    path.release_hold()
    path.release_hold()
    path = open_path()
    with pytest.raises(RuntimeError, match="prepare"):
        path.release_hold()
    path.prepare(DOMAIN)
    path.release_hold()


def test_remove_is_idempotent(path: DataPath) -> None:
    path.apply({LAN: arrivals()})
    assert path.remove(DOMAIN)
    assert path.remove(DOMAIN) == []
    assert path.anchor_numbers(DOMAIN.table) == {}


def test_remove_after_a_restart_and_prepare_after_remove(open_path: Open, path: DataPath) -> None:
    path.apply({LAN: arrivals()})
    path = open_path()
    assert path.remove(DOMAIN)
    path.prepare(DOMAIN)
    assert path.read() == {LAN: NetworkState()}


@pytest.mark.parametrize("peers", [0, 1, 2])
def test_any_number_of_peers(open_path: Open, peers: int) -> None:
    small: Domain = replace(DOMAIN, peers=DOMAIN.peers[:peers])
    path = open_path()
    path.prepare(small)
    assert path.anchor_numbers(DOMAIN.table) == {p.id: p.number for p in small.peers}
