"""The nftables table on the real kernel: what it looks like and who may change it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from ipaddress import IPv4Address

import pytest

from apagent.core.desired import ANY_ANCHOR, NOBODY, difference
from apagent.core.domain import Forward
from apagent.core.model import ApId, Flow, FlowKey, Mac, NetworkName, socket_of
from apagent.errors import KernelFault
from apagent.kernel.nft import NftTable
from apagent.kernel.port import Change, NetworkDelta, NetworkState
from apagent.kernel.wire import Message, Netlink
from tests.contract.conftest import run, without_time
from tests.domains import (
    ANN,
    ANN_IP,
    AP1,
    AP2,
    AP3,
    BEN,
    BEN_IP,
    LAN,
    domain,
    lan,
    takeover,
    tcp,
    udp,
)

pytestmark = [pytest.mark.netns, pytest.mark.usefixtures("access_point")]

DOMAIN = domain()
NAT_ADDRESS = IPv4Address("203.0.113.77")
TWO_NETWORKS = domain(
    networks=(lan(), replace(lan("zoo", "10.78.16.0/20", 78), nat_address=NAT_ADDRESS))
)
ECHO = Flow(1, ANN_IP, 77, IPv4Address("198.51.100.10"), 0).key
EMBEDDED = "@th,192,32 . @th,160,32 . @th,136,8 . @th,240,16 . @th,224,16"
"""The flow of the packet that an ICMP error speaks of, the other way round."""
UNKNOWN = ApId("#2")
STATE = NetworkState(
    flows={tcp(1000): AP2, udp(2000): AP3, ECHO: AP2},
    sockets={socket_of(udp(2000)): AP3},
    known={BEN_IP: BEN},
    home={BEN_IP: BEN},
    elsewhere={ANN_IP: ANN},
    places={ANN_IP: AP3},
)


@pytest.fixture
def open_table() -> Iterator[Callable[[], NftTable]]:
    """Opens tables as successive runs of an agent do: the former's socket is closed."""
    opened: list[NftTable] = []

    def open_() -> NftTable:
        for former in opened:
            former.close()
        opened[:] = [NftTable()]
        return opened[0]

    yield open_
    for table in opened:
        table.close()


@pytest.fixture
def table(open_table: Callable[[], NftTable]) -> NftTable:
    """A prepared table that holds nothing back any more, which the kernel's timer would end."""
    return in_sync(open_table())


def in_sync(table: NftTable) -> NftTable:
    table.prepare(DOMAIN)
    table.release_hold(DOMAIN)
    return table


def arrivals(state: NetworkState = STATE) -> NetworkDelta:
    """The delta from nothing to `state`."""
    return NetworkDelta(
        flows={flow: Change(None, anchor) for flow, anchor in state.flows.items()},
        sockets={socket: Change(None, anchor) for socket, anchor in state.sockets.items()},
        known={address: Change(None, mac) for address, mac in state.known.items()},
        home={address: Change(None, mac) for address, mac in state.home.items()},
        elsewhere={address: Change(None, mac) for address, mac in state.elsewhere.items()},
        places={address: Change(None, ap) for address, ap in state.places.items()},
    )


def ruleset(*options: str) -> str:
    return without_time(run("nft", *options, "list", "ruleset"))


def chain(name: str, *options: str) -> list[str]:
    """The lines between a chain's braces, without the fingerprint."""
    lines = run("nft", *options, "list", "chain", "inet", "apagent", name).splitlines()[2:-2]
    return [line.strip().partition(' comment "apagent ')[0] for line in lines]


def refused(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    return done.stderr


# What it looks like


def test_rules_read_as_they_are_meant(table: NftTable) -> None:
    table.prepare(TWO_NETWORKS)
    assert chain("anchor_ap2") == [
        "meta mark set meta mark & 0x01ffffff | 0x01000000",
        "notrack",
        "accept",
    ]
    assert chain("zoo_from_client") == [
        "ip saddr 10.77.0.0/16 drop",
        "ip saddr != 10.78.16.0/20 return",
        "ip saddr . ether saddr != @zoo_known jump zoo_unknown",
        "ip daddr 10.78.16.0/20 goto zoo_inside",
        "meta nfproto ipv4 meta priority set 6170:ffff",
        "meta priority set ip saddr . ip daddr . meta l4proto . th sport . th dport map @zoo_flows",
        "meta l4proto icmp jump zoo_icmp",
        (
            "meta priority 6170:ffff meta priority set"
            " ip saddr . meta l4proto . th sport map @zoo_sockets"
        ),
        "meta priority vmap @zoo_anchors",
    ]
    assert chain("zoo_inside") == ["ip daddr 10.78.16.1 return", "notrack accept"]
    assert chain("zoo_icmp") == [
        "icmp type echo-request meta priority set ip saddr . ip daddr . icmp id map @zoo_echoes",
        f"icmp type != echo-request meta priority set {EMBEDDED} map @zoo_flows",
    ]
    assert chain("lan_new") == [
        "fib daddr type != unicast return",
        "iifname @unsynced meta l4proto != tcp drop",
        "tcp flags != syn / fin,syn,rst,ack ip saddr . ether saddr != @lan_known drop",
        "tcp flags != syn / fin,syn,rst,ack ip saddr @lan_arrived drop",
        "meta priority vmap @lan_new_anchor",
    ]
    assert chain("lan_stray") == [
        'iifname "br-lan" ip saddr . ether saddr != @lan_known drop',
        'iifname "br-lan" ip saddr @lan_arrived drop',
        'meta l4proto tcp counter name "reset_packets" reject with tcp reset',
    ]
    assert chain("lan_unknown") == [
        "ip saddr . ether saddr @lan_elsewhere ip saddr != @left jump here_seen",
        "limit rate 100/second burst 50 packets log group 77 snaplen 64",
    ]
    assert chain("lan_from_tunnel") == [
        "meta mark set 0x00000000",
        "ip saddr 10.77.0.0/16 jump lan_sender",
        "ip daddr 10.77.0.0/16 notrack accept",
    ]
    assert chain("lan_sender") == [
        "ip saddr . ether saddr != @lan_places ether saddr vmap @senders",
        "delete @learned { ip saddr : 6170:0 }",
    ]
    assert chain("seen_ap2") == [
        "delete @settled { ip saddr }",
        "meta priority set ip saddr map @learned",
        "meta priority != 6170:1 delete @learned { ip saddr : 6170:1 }",
        "update @learned { ip saddr : 6170:1 }",
        "meta priority set none",
    ]
    assert chain("to_client") == [
        "meta priority set ip daddr map @learned meta priority vmap @ways",
    ]
    assert chain("answer") == [
        "meta priority set ip daddr map @learned meta priority 6170:0 jump here_way",
    ]
    assert chain("here_way") == [
        "ip daddr @settled return",
        "meta mark set meta mark | 0xff000000",
    ]
    assert chain("way_ap2") == [
        'iifname "apv-*" return',
        "ip daddr @settled return",
        "meta mark set meta mark & 0x01ffffff | 0x01000000",
    ]
    assert chain("mss_clamp") == [
        "ip saddr 10.77.0.0/16 tcp option maxseg size set 1410",
        "ip daddr 10.77.0.0/16 tcp option maxseg size set 1410",
        "ip saddr 10.78.16.0/20 tcp option maxseg size set 1410",
        "ip daddr 10.78.16.0/20 tcp option maxseg size set 1410",
    ]


def test_base_chains_hang_where_they_should(table: NftTable) -> None:
    table.prepare(TWO_NETWORKS)
    assert chain("prerouting") == [
        "type filter hook prerouting priority raw; policy accept;",
        *(
            f'iifname "br-{name}" ip saddr . ether saddr @{name}_home'
            f" ip daddr != {prefix} meta l4proto != icmp return"
            for name, prefix in (("lan", "10.77.0.0/16"), ("zoo", "10.78.16.0/20"))
        ),
        'iifname "br-lan" goto lan_from_client',
        'iifname "apv-lan" goto lan_from_tunnel',
        'iifname "br-zoo" goto zoo_from_client',
        'iifname "apv-zoo" goto zoo_from_tunnel',
        "ip daddr 10.99.0.1 udp dport 4789 notrack",
    ]
    assert chain("output")[-1] == "ip saddr 10.99.0.1 udp dport 4789 notrack"
    assert chain("learned_ways") == [
        "type filter hook prerouting priority dstnat + 10; policy accept;",
        "ip daddr 10.77.0.0/16 jump to_client",
        "ip daddr 10.78.16.0/20 jump to_client",
    ]
    assert chain("learned_answers") == [
        "type route hook output priority mangle; policy accept;",
        "ip daddr 10.77.0.0/16 jump answer",
        "ip daddr 10.78.16.0/20 jump answer",
    ]
    assert chain("forward")[:7] == [
        "type filter hook forward priority mangle; policy accept;",
        "tcp flags syn / syn,rst jump mss_clamp",
        'ct state established,related oifname "wan" return',
        'ct state established,related iifname "wan" return',
        "ct state invalid,new jump opening",
        'iifname "apv-lan" oifname "apv-lan" ip ttl < 2 drop',
        'iifname "apv-lan" oifname "apv-lan" ip ttl > 3 ip ttl set 3',
    ]
    assert chain("opening")[:5] == [
        *(
            f'iifname "{device}" oifname "wan" ip saddr 10.77.0.0/16 {kind} jump lan_stray'
            for device in ("br-lan", "apv-lan")
            for kind in (
                "ct state new tcp flags != syn / fin,syn,rst,ack",
                "ct state invalid tcp flags fin,rst",
            )
        ),
        (
            'oifname "wan" ip saddr 10.77.0.0/16 iifname @unsynced ct state new'
            " meta l4proto != tcp drop"
        ),
    ]
    assert chain("srcnat") == [
        "type nat hook postrouting priority srcnat - 10; policy accept;",
        'oifname "wan" ip saddr 10.77.0.0/16 masquerade',
        f'oifname "wan" ip saddr 10.78.16.0/20 snat ip to {NAT_ADDRESS}',
    ]
    assert chain("leak_guard") == [
        "type filter hook postrouting priority 300; policy accept;",
        'ip saddr 10.77.0.0/16 oifname "wan" counter name "leaked_packets" drop',
        'ip saddr 10.78.16.0/20 oifname "wan" counter name "leaked_packets" drop',
        'meta mark != 0x00000000 oifname "apv-lan" meta mark set 0x00000000',
        'meta mark != 0x00000000 oifname "apv-zoo" meta mark set 0x00000000',
    ]


def test_a_networks_clients_at_home_are_told_by_their_addresses_where_it_is_the_only_one(
    table: NftTable,
) -> None:
    assert chain("prerouting")[1] == (
        "ip saddr 10.77.0.0/16 ip saddr . ether saddr @lan_home ip daddr != 10.77.0.0/16"
        " meta l4proto != icmp return"
    )
    assert chain("forward")[2] == "ct state established,related return"


def test_with_takeover_the_source_of_new_flows_is_looked_up(table: NftTable) -> None:
    table.prepare(domain(networks=(takeover(),)))
    change = Change(None, IPv4Address("203.0.113.21"))
    table.apply(domain(networks=(takeover(),)), {LAN: NetworkDelta(sources={"wan": change})})
    assert chain("srcnat")[1:] == [
        'oifname "wan" ip saddr 10.77.0.0/16 snat ip to oifname map @lan_sources',
        'oifname "wan" ip saddr 10.77.0.0/16 masquerade',
    ]
    assert 'elements = { "wan" : 203.0.113.21 }' in ruleset()
    for address in ("saddr", "daddr"):
        rule = f"ct state new ip {address} 10.77.0.0/16 ct event set new,destroy,assured"
        assert rule in chain("opening")
    listed = loadable(ruleset())
    again = run("unshare", "--net", "sh", "-c", "nft -f - && nft list ruleset", stdin=listed)
    assert without_time(again) == without_time(listed)


def test_with_takeover_port_forwards_are_looked_up(table: NftTable) -> None:
    network = replace(takeover(), forwards=(Forward(6, 8080, ANN_IP, 80),))
    table.prepare(domain(networks=(network,)))
    change = {outside: Change(None, inside) for outside, inside in network.forwarded.items()}
    table.apply(domain(networks=(network,)), {LAN: NetworkDelta(forwards=change)})
    rule = 'iifname "wan" dnat ip to ip daddr . meta l4proto . th dport map @lan_forwards'
    assert chain("dstnat")[1:] == [rule]
    assert "elements = { 203.0.113.21 . tcp . 8080 : 10.77.1.1 . 80 }" in ruleset()
    listed = loadable(ruleset())
    again = run("unshare", "--net", "sh", "-c", "nft -f - && nft list ruleset", stdin=listed)
    assert without_time(again) == without_time(listed)


def test_without_takeover_port_forwards_are_rules(table: NftTable) -> None:
    forwards = (Forward(6, 8080, ANN_IP, 80), Forward(17, 5060, ANN_IP, 5061))
    own = replace(lan(), forwards=forwards)
    table.prepare(domain(networks=(own,)))
    here = 'iifname "wan" fib daddr type local meta nfproto ipv4'
    assert chain("dstnat")[1:] == [
        f"{here} tcp dport 8080 dnat ip to 10.77.1.1:80",
        f"{here} udp dport 5060 dnat ip to 10.77.1.1:5061",
    ]
    assert "lan_forwards" not in ruleset()


def test_isolated_clients_have_rules_of_their_own(table: NftTable) -> None:
    """Established or not, no packet between them passes."""
    *first, established = chain("forward")[:3]
    rest = chain("forward")[3:]
    assert established == "ct state established,related return"
    table.prepare(replace(DOMAIN, networks=(replace(lan(), isolate_clients=True),)))
    assert chain("forward") == [
        *first,
        'ct state established,related oifname "wan" return',
        'ct state established,related iifname "wan" return',
        *rest,
        'iifname "br-lan" oifname "apv-lan" ip daddr 10.77.0.0/16 drop',
        'iifname "br-lan" oifname "br-lan" ip daddr 10.77.0.0/16 drop',
        'iifname "apv-lan" oifname "br-lan" ip saddr 10.77.0.0/16 drop',
    ]


def test_elements_read_as_they_are_meant(table: NftTable) -> None:
    table.apply(DOMAIN, {LAN: arrivals()})
    text = " ".join(ruleset().split())
    assert "10.77.1.1 . 198.51.100.10 . tcp . 1000 . 80 : 6170:1" in text
    assert "10.77.1.1 . 198.51.100.10 . 77 : 6170:1" in text
    assert "elements = { 10.77.1.1 . udp . 2000 : 6170:2 }" in text
    assert f"elements = {{ 10.77.1.2 . {BEN} }}" in text
    assert f"elements = {{ {ANN_IP} . {ANN} }}" in text
    assert f"elements = {{ {ANN_IP} . {DOMAIN.peers[1].tunnel_mac} }}" in text
    assert "elements = { 6170:1 : goto anchor_ap2, 6170:2 : goto anchor_ap3 }" in text
    for key, chain_ in (("6170:0", "here_way"), ("6170:1", "way_ap2"), ("6170:2", "way_ap3")):
        assert f"{key} : goto {chain_}" in text
    for peer in DOMAIN.peers:
        assert f"{peer.tunnel_mac} : goto seen_{peer.id}" in text


def test_the_listing_is_a_ruleset_that_nft_loads(table: NftTable) -> None:
    table.prepare(TWO_NETWORKS)
    table.apply(TWO_NETWORKS, {LAN: arrivals()})
    listed = loadable(ruleset())
    again = run("unshare", "--net", "sh", "-c", "nft -f - && nft list ruleset", stdin=listed)
    assert again == listed


def loadable(listed: str) -> str:
    """A listing without the owner, and without the one rule that nft prints but doesn't take.

    nft has no field for a packet inside an ICMP error. Raw payload is an integer to it, which a
    map from addresses and ports refuses; and a map from integers would refuse the fields of the
    outer headers, which nft always prints by their names.
    """
    lines = listed.replace("\tflags owner\n\n", "").splitlines(keepends=True)
    kept = [line.partition(" # progname")[0].rstrip("\n") + "\n" for line in lines]
    return "".join(line for line in kept if EMBEDDED not in line)


# Elements


def test_what_is_applied_is_read(table: NftTable) -> None:
    assert table.read(DOMAIN) == {LAN: NetworkState()}
    table.apply(DOMAIN, {LAN: arrivals()})
    assert table.read(DOMAIN) == {LAN: STATE}


def test_values_change_and_elements_go(table: NftTable) -> None:
    table.apply(DOMAIN, {LAN: arrivals()})
    socket = socket_of(udp(2000))
    changes = NetworkDelta(
        flows={tcp(1000): Change(AP2, AP3), ECHO: Change(AP2, None)},
        sockets={socket: Change(AP3, AP2)},
        known={BEN_IP: Change(BEN, None)},
        home={BEN_IP: Change(BEN, None)},
        elsewhere={ANN_IP: Change(ANN, BEN)},
        places={ANN_IP: Change(AP3, AP2)},
    )
    table.apply(DOMAIN, {LAN: changes})
    assert table.read(DOMAIN) == {
        LAN: NetworkState(
            flows={tcp(1000): AP3, udp(2000): AP3},
            sockets={socket: AP2},
            elsewhere={ANN_IP: BEN},
            places={ANN_IP: AP2},
        )
    }


def test_diverted_anchors_read_as_they_are_meant(table: NftTable) -> None:
    diverted = {AP2: AP3, AP3: NOBODY, ANY_ANCHOR: AP2}
    table.apply(DOMAIN, {LAN: divert(diverted)})
    text = " ".join(ruleset().split())
    assert "elements = { 6170:1 : goto anchor_ap3, 6170:ffff : jump lan_new }" in text
    assert "elements = { 6170:ffff : goto anchor_ap2 }" in text
    assert table.read(DOMAIN)[LAN].diverted == diverted


def divert(diverted: Mapping[ApId, ApId]) -> NetworkDelta:
    """The delta from quiet times to `diverted`."""
    return NetworkDelta(diverted={anchor: Change(None, ap) for anchor, ap in diverted.items()})


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The maps that transactions change, in their order."""
    done: list[str] = []
    transaction = Netlink.transaction

    def record(netlink: Netlink, begin: Message, batch: Sequence[Message], end: Message) -> None:
        done.extend(message.what.split()[-1] for message in batch)
        transaction(netlink, begin, batch, end)

    monkeypatch.setattr(Netlink, "transaction", record)
    return done


def test_our_flows_are_in_the_maps_before_new_ones_go_elsewhere(
    table: NftTable, order: list[str]
) -> None:
    """And until they don't any more."""
    draining = NetworkState(flows={tcp(1): DOMAIN.me.id}, diverted={ANY_ANCHOR: AP2})
    table.apply(DOMAIN, {LAN: difference(NetworkState(), draining)})
    assert order == ["lan_flows", "lan_new_anchor", "lan_anchors"]
    order.clear()
    table.apply(DOMAIN, {LAN: difference(draining, NetworkState())})
    assert order == ["lan_anchors", "lan_new_anchor", "lan_flows"]


@pytest.mark.parametrize(
    ("after", "first"),
    [
        pytest.param({tcp(1): AP3, tcp(2): AP3}, "lan_anchors", id="one-successor"),
        pytest.param({tcp(1): AP3, tcp(2): AP1}, "lan_flows", id="two-successors"),
        pytest.param({tcp(1): AP3}, "lan_flows", id="we-are-one"),
    ],
)
def test_a_flow_is_never_led_to_the_successor_of_another_address(
    table: NftTable, order: list[str], after: dict[FlowKey, ApId], first: str
) -> None:
    """What a dead anchor held may have two successors, and each knows its own flows only."""
    dying = NetworkState(flows={tcp(1): AP2, tcp(2): AP2, tcp(3): AP2})
    table.apply(DOMAIN, {LAN: difference(NetworkState(), dying)})
    order.clear()
    taken = NetworkState(flows={tcp(3): AP2, **after}, diverted={AP2: AP3})
    table.apply(DOMAIN, {LAN: difference(dying, taken)})
    assert order[0] == first
    assert table.read(DOMAIN) == {LAN: taken}


def test_networks_are_kept_apart(table: NftTable) -> None:
    table.prepare(TWO_NETWORKS)
    zoo = NetworkState(flows={tcp(5): AP3})
    table.apply(TWO_NETWORKS, {LAN: arrivals(), NetworkName("zoo"): arrivals(zoo)})
    assert table.read(TWO_NETWORKS) == {LAN: STATE, "zoo": zoo}


def test_a_change_that_believes_wrongly_is_refused_whole(table: NftTable) -> None:
    changes = NetworkDelta(flows={tcp(1): Change(None, AP2), tcp(2): Change(AP2, None)})
    with pytest.raises(KernelFault, match=r"elements of inet apagent lan_flows: .*ENOENT"):
        table.apply(DOMAIN, {LAN: changes})
    assert table.read(DOMAIN) == {LAN: NetworkState()}


@pytest.mark.parametrize("kernel_counts", [True, False])
def test_a_hundred_thousand_flows_are_applied_and_read(
    table: NftTable, monkeypatch: pytest.MonkeyPatch, kernel_counts: bool
) -> None:
    """The kernel resizes its hash table meanwhile, which makes single dumps incomplete."""
    if not kernel_counts:  # before Linux 6.17
        monkeypatch.setattr("apagent.kernel.nft.table.read_set_size", lambda *_: None)
    flows = {
        Flow(6, ANN_IP, 1024 + n % 1000, IPv4Address("198.51.100.0") + n // 1000, 80).key: AP2
        for n in range(100_000)
    }
    table.apply(DOMAIN, {LAN: arrivals(NetworkState(flows=flows))})
    assert table.read(DOMAIN)[LAN].flows == flows


# Adoption


def test_preparing_again_touches_nothing(table: NftTable) -> None:
    table.apply(DOMAIN, {LAN: arrivals()})
    before = ruleset("--handle")
    table.prepare(DOMAIN)
    assert ruleset("--handle") == before


def test_the_next_run_adopts_all(open_table: Callable[[], NftTable]) -> None:
    first = open_table()
    assert first.anchor_numbers(DOMAIN.table) == {}
    in_sync(first)
    first.apply(DOMAIN, {LAN: arrivals()})
    before = ruleset("--handle")
    second = open_table()
    assert second.anchor_numbers(DOMAIN.table) == {AP2: 1, AP3: 2}
    second.prepare(DOMAIN)
    assert ruleset("--handle") == before
    assert second.read(DOMAIN) == {LAN: STATE}


def test_only_a_fresh_table_holds_back(open_table: Callable[[], NftTable]) -> None:
    first = open_table()
    first.prepare(TWO_NETWORKS)
    assert held() == ["br-lan", "br-zoo"]
    first.release_hold(TWO_NETWORKS)
    first.release_hold(TWO_NETWORKS)
    assert held() == []
    open_table().prepare(TWO_NETWORKS)
    assert held() == []


def test_a_table_that_was_never_filled_holds_back(open_table: Callable[[], NftTable]) -> None:
    run("nft", "add", "table", "inet", "apagent")
    _, fresh = open_table().prepare(DOMAIN)
    assert (fresh, held()) == (True, ["br-lan"])


def test_a_restart_does_not_lengthen_the_hold(open_table: Callable[[], NftTable]) -> None:
    brief = replace(DOMAIN, sync_timeout_s=0.5)
    begin = time.monotonic()
    open_table().prepare(brief)
    while held() and time.monotonic() < begin + 10:
        open_table().prepare(brief)
    assert held() == []
    assert time.monotonic() - begin > 0.4


def held() -> list[str]:
    """The client interfaces that hold something back."""
    return re.findall(r'"(\S+)" expires', run("nft", "list", "set", "inet", "apagent", "unsynced"))


def test_a_vanished_peer_leaves_only_elements_behind(table: NftTable) -> None:
    table.apply(DOMAIN, {LAN: arrivals()})
    fewer = replace(DOMAIN, peers=DOMAIN.peers[:1])
    table.prepare(fewer)
    assert "anchor_ap3" not in ruleset()
    state = table.read(fewer)[LAN]
    assert state.flows == {tcp(1000): AP2, udp(2000): UNKNOWN, ECHO: AP2}
    assert state.sockets == {socket_of(udp(2000)): UNKNOWN}
    gone = state.places[ANN_IP]
    assert gone == f"#{DOMAIN.peers[1].tunnel_mac}"
    changes = NetworkDelta(
        flows={udp(2000): Change(UNKNOWN, None)}, places={ANN_IP: Change(gone, None)}
    )
    table.apply(fewer, {LAN: changes})
    assert udp(2000) not in table.read(fewer)[LAN].flows
    assert table.read(fewer)[LAN].places == {}


def test_a_new_peer_leaves_the_others_rules_alone(table: NftTable) -> None:
    before = chain("lan_from_client", "--handle")
    more = domain(aps=4)
    table.prepare(more)
    table.apply(more, {LAN: NetworkDelta(flows={tcp(1): Change(None, ApId("ap4"))})})
    assert chain("anchor_ap4")[0] == "meta mark set meta mark & 0x03ffffff | 0x03000000"
    assert chain("lan_from_client", "--handle") == before


def test_a_number_that_changes_hands_leads_to_its_new_anchor(table: NftTable) -> None:
    ap2, ap3 = DOMAIN.peers
    table.prepare(replace(DOMAIN, peers=(replace(ap2, number=2), replace(ap3, number=1))))
    assert table.anchor_numbers(DOMAIN.table) == {AP3: 1, AP2: 2}


def test_diverted_anchors_stay_so_when_the_next_run_adopts_them(
    open_table: Callable[[], NftTable],
) -> None:
    diverted = {AP2: AP3, AP3: NOBODY, ANY_ANCHOR: AP2}
    in_sync(open_table()).apply(DOMAIN, {LAN: divert(diverted)})
    before = ruleset("--handle")
    second = open_table()
    assert second.anchor_numbers(DOMAIN.table) == {AP2: 1, AP3: 2}
    second.prepare(DOMAIN)
    assert ruleset("--handle") == before
    assert second.read(DOMAIN)[LAN].diverted == diverted


def test_what_was_diverted_to_a_vanished_peer_is_nobodys(table: NftTable) -> None:
    table.apply(DOMAIN, {LAN: divert({AP2: AP3, ANY_ANCHOR: AP3})})
    fewer = replace(DOMAIN, peers=DOMAIN.peers[:1])
    table.prepare(fewer)
    assert table.read(fewer)[LAN].diverted == {AP2: NOBODY}
    assert "6170:ffff :" not in ruleset()
    table.apply(fewer, {LAN: NetworkDelta(diverted={AP2: Change(NOBODY, None)})})
    assert table.read(fewer)[LAN] == NetworkState()


def test_a_new_peer_begins_undiverted_while_others_are(table: NftTable) -> None:
    table.apply(DOMAIN, {LAN: divert({AP2: NOBODY})})
    more = domain(aps=4)
    table.prepare(more)
    assert table.read(more)[LAN].diverted == {AP2: NOBODY}


@pytest.mark.parametrize("map_", ["lan_anchors", "lan_new_anchor"])
def test_anchors_that_somebody_flushed_are_read_as_they_are(
    open_table: Callable[[], NftTable], map_: str
) -> None:
    in_sync(open_table()).apply(DOMAIN, {LAN: divert({ANY_ANCHOR: AP2})})
    open_table()
    run("nft", f"flush map inet apagent {map_}")
    table = open_table()
    table.prepare(DOMAIN)
    flushed = {AP2: NOBODY, AP3: NOBODY} if map_ == "lan_anchors" else {}
    assert table.read(DOMAIN)[LAN].diverted == flushed
    back = {ap: Change(NOBODY, None) for ap in flushed}
    table.apply(DOMAIN, {LAN: NetworkDelta(diverted={**back, ANY_ANCHOR: Change(None, AP3)})})
    assert table.read(DOMAIN)[LAN].diverted == {ANY_ANCHOR: AP3}


def test_networks_come_and_go(table: NftTable) -> None:
    table.apply(DOMAIN, {LAN: arrivals()})
    table.prepare(TWO_NETWORKS)
    assert table.read(TWO_NETWORKS) == {LAN: STATE, "zoo": NetworkState()}
    table.prepare(DOMAIN)
    assert table.read(DOMAIN) == {LAN: STATE}
    assert "zoo" not in ruleset()


def test_changed_rules_leave_sessions_alone(table: NftTable) -> None:
    table.apply(DOMAIN, {LAN: arrivals()})
    table.prepare(replace(DOMAIN, tunnel_mtu=1400))
    assert chain("mss_clamp")[0].endswith("size set 1360")
    assert table.read(DOMAIN) == {LAN: STATE}


@pytest.mark.parametrize(
    "harm",
    [
        pytest.param("flush chain inet apagent srcnat", id="chain flushed"),
        pytest.param("insert rule inet apagent leak_guard accept", id="rule inserted"),
        pytest.param("add rule inet apagent anchor_ap2 drop", id="rule added"),
        pytest.param("add chain inet apagent mine", id="chain added"),
        pytest.param("add counter inet apagent mine", id="counter added"),
        pytest.param("add map inet apagent mine { type mark : verdict; }", id="map added"),
        pytest.param(
            "delete chain inet apagent forward;"
            "add chain inet apagent forward { type filter hook forward priority 5; }",
            id="chain at another hook",
        ),
        pytest.param(
            "flush chain inet apagent lan_from_client; flush chain inet apagent lan_icmp;"
            " flush chain inet apagent lan_own_error;"
            "delete map inet apagent lan_flows;"
            "add map inet apagent lan_flows { type ipv4_addr : mark; }",
            id="map of another type",
        ),
    ],
)
def test_harm_done_while_no_agent_ran_is_repaired(
    open_table: Callable[[], NftTable], harm: str
) -> None:
    in_sync(open_table())
    before = sorted(ruleset().splitlines()[1:])
    open_table()
    run("nft", harm)
    assert sorted(ruleset().splitlines()[1:]) != before
    open_table().prepare(DOMAIN)
    assert sorted(ruleset().splitlines()[1:]) == before


def test_a_table_without_an_owner_is_adopted_as_it_is(table: NftTable) -> None:
    listed = ruleset()
    table.remove(DOMAIN)
    run("nft", "-f", "-", stdin=loadable(listed))
    table.prepare(DOMAIN)
    assert "owner" not in ruleset()
    assert table.anchor_numbers(DOMAIN.table) == {AP2: 1, AP3: 2}


def test_a_client_that_comes_again_has_the_whole_grace_again(table: NftTable) -> None:
    table.apply(DOMAIN, {LAN: known({ANN_IP: (None, ANN), BEN_IP: (None, BEN)})})
    time.sleep(0.3)
    table.apply(DOMAIN, {LAN: known({ANN_IP: (ANN, None)})})
    table.apply(DOMAIN, {LAN: known({ANN_IP: (None, ANN)})})
    listed = run("nft", "list", "set", "inet", "apagent", "lan_arrived")
    left = dict(re.findall(r"([\d.]+) expires (\d+)ms", listed))
    assert int(left[str(ANN_IP)]) > int(left.get(str(BEN_IP), 0)) + 100


def known(changes: dict[IPv4Address, tuple[Mac | None, Mac | None]]) -> NetworkDelta:
    return NetworkDelta(known={address: Change(*change) for address, change in changes.items()})


# Ownership


def test_others_cannot_change_the_table_while_the_agent_runs(table: NftTable) -> None:
    table.apply(DOMAIN, {LAN: arrivals()})
    before = ruleset()
    run("nft", "flush", "ruleset")
    assert ruleset() == before
    assert "not permitted" in refused("nft", "delete", "table", "inet", "apagent")


def test_a_second_agent_is_told_whom_the_table_belongs_to(table: NftTable) -> None:
    second = NftTable()
    try:
        with pytest.raises(KernelFault, match=r"belongs to a running process .*stop it first"):
            second.prepare(DOMAIN)
        with pytest.raises(KernelFault, match="belongs to a running process"):
            second.remove(DOMAIN)
    finally:
        second.close()


def test_a_killed_agents_table_stays_and_is_adopted(open_table: Callable[[], NftTable]) -> None:
    agent = """
        import signal
        from apagent.kernel.nft import NftTable
        from tests.domains import domain
        table = NftTable()
        table.prepare(domain())
        print("ready", flush=True)
        signal.pause()
    """
    argv = [sys.executable, "-c", textwrap.dedent(agent)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        table = open_table()
        with pytest.raises(KernelFault, match=f"netlink port {process.pid}"):
            table.prepare(DOMAIN)
        os.kill(process.pid, signal.SIGKILL)
    assert "goto anchor_ap2" in ruleset()
    table.prepare(DOMAIN)
    assert "not permitted" in refused("nft", "delete", "table", "inet", "apagent")


def test_what_a_former_run_left_can_be_removed(open_table: Callable[[], NftTable]) -> None:
    open_table().prepare(DOMAIN)
    assert open_table().remove(DOMAIN) == ["nftables table inet apagent"]
    assert ruleset() == ""


def test_removal_leaves_foreign_tables_alone(table: NftTable) -> None:
    run("nft", "add table inet other; add chain inet other c")
    assert table.remove(DOMAIN) == ["nftables table inet apagent"]
    assert table.remove(DOMAIN) == []
    assert run("nft", "list", "tables") == "table inet other\n"


def test_counters_need_a_prepared_table(open_table: Callable[[], NftTable]) -> None:
    with pytest.raises(KernelFault, match="no nftables table is prepared"):
        open_table().counters()
