"""What other programs do to our kernel state is put back, while a client's flow goes on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from socket import socket

import pytest

from apagent.core.domain import tunnel_mac
from apagent.core.model import ApId
from apagent.lab.lab import Lab
from tests.netns.conftest import MakeLab, leaks_expected, stopped_leaks_expected
from tests.netns.nat_support import accepted, exchange, known_everywhere, listening, roam, tcp
from tests.netns.observe import SERVER, address, ask, becomes, installed, uplink
from tests.netns.test_other_firewalls import BY_INCLUDE

pytestmark = pytest.mark.netns

DEVICE = "apv-lan"
PEER_MACS = {ap: tunnel_mac(ApId(ap)) for ap in ("ap1", "ap2", "ap3")}
CLIENT = "10.77.1.1"
Record = Callable[[str, object], None]

ROUTING = {
    "a policy rule": "ip rule del priority 702",
    "all policy rules": "ip rule flush protocol 176",
    "an anchor's route": "ip route del default table 77001",
    "a route replaced": "ip route replace default via 10.99.0.3 dev bh table 77001",
    "a client's neighbour entry": f"ip neigh del {CLIENT} dev br-lan",
    "a neighbour entry changed": f"ip neigh replace {CLIENT} lladdr 02:00:00:00:0f:0f dev br-lan",
    "all neighbour entries": "ip neigh flush nud permanent",
    "a forwarding entry": f"bridge fdb del {PEER_MACS['ap1']} dev {DEVICE}",
    "the tunnel device": f"ip link del {DEVICE}",
    "the tunnel device down": f"ip link set {DEVICE} down",
    "the tunnel device down and up": f"ip link set {DEVICE} down; ip link set {DEVICE} up",
    "its MTU": f"ip link set {DEVICE} mtu 1200",
    "its MAC": f"ip link set {DEVICE} address 02:00:00:00:0f:0f",
    "its address": f"ip address flush dev {DEVICE}",
    "proxy ARP": "sysctl -qw net.ipv4.conf.br-lan.proxy_arp=0",
    "the bridge's MAC": "ip link set br-lan address 02:00:00:00:0f:0f; "
    "ip link set br-lan address 02:00:00:00:00:fe",
}
AT_THE_ANCHOR = {
    "the host routes": "ip route flush table 77000",
    "a host route": f"ip route del {CLIENT} table 77000",
    "a host route replaced": f"ip route replace {CLIENT} dev br-lan table 77000",
    "the tunnel device": f"ip link del {DEVICE}",
}
UNOWNED = {
    "the ruleset": "nft flush ruleset",
    "the table": "nft delete table inet apagent",
    "what OpenWrt's firewall does at a stop": "nft list tables | while read _ family table; do "
    "nft delete table $family $table; done; true",
    "a chain's rules": "nft flush chain inet apagent lan_from_client",
    "a rule": "nft delete rule inet apagent srcnat handle "
    "$(nft -a list chain inet apagent srcnat | sed -n 's/.*masquerade.* handle //p')",
    "a rule in front": "nft insert rule inet apagent prerouting counter drop",
    "all rules and a set": "nft 'flush table inet apagent; delete set inet apagent lan_arrived'",
    "a verdict": "nft flush map inet apagent lan_anchors",
    "a dormant table": "nft 'table inet apagent { flags dormant; }'",
}


ELEMENTS = {
    "an element": "nft delete element inet apagent lan_flows "
    "{ $(nft list map inet apagent lan_flows | sed -n 's/.*elements = { \\([^,]*\\) : .*/\\1/p') }",
    "all flows": "nft flush map inet apagent lan_flows",
    "all known clients": "nft flush set inet apagent lan_known",
}


@pytest.fixture(scope="module")
def domain(module_lab: MakeLab) -> Lab:
    return module_lab(aps=3, clients=1)


def repairs(lab: Lab, ap: str) -> int:
    return int(ask(lab, ap, "status")["repairs"])


@contextlib.contextmanager
def roamed_connection(lab: Lab) -> Iterator[tuple[socket, socket]]:
    """Both ends of a connection that is anchored at ap1, while its client is at ap2."""
    roam(lab, "client1", "ap1")
    with (
        listening(lab, "server", SERVER) as listener,
        tcp(lab, "client1", listener.getsockname()) as near,
    ):
        far, (source, _) = accepted(listener)
        with far:
            assert source == uplink("ap1")
            known_everywhere(lab)
            roam(lab, "client1", "ap2")
            exchange(near, far)
            settle(lab)
            yield near, far


def settle(lab: Lab) -> None:
    """Wait until the grace of the arrived client is over: what is installed changes by that."""
    becomes(
        lambda: any("expires" in lab.run(ap, ["nft", "list", "ruleset"]).stdout for ap in lab.aps),
        wanted=False,
    )


def damage_is_mended(lab: Lab, ap: str, damage: str, record: Record) -> None:
    """Do the damage at an AP, and wait until all is as it was."""
    before, counted = installed(lab, ap), repairs(lab, ap)
    lab.run(ap, ["sh", "-c", damage])
    began = time.monotonic()
    becomes(lambda: installed(lab, ap), before)
    record("mended_ms", round((time.monotonic() - began) * 1e3))
    assert repairs(lab, ap) > counted
    assert ask(lab, ap, "status")["degraded"] == []


@pytest.mark.parametrize("damage", ROUTING.values(), ids=ROUTING.keys())
def test_routing_at_the_serving_ap(domain: Lab, damage: str, record_property: Record) -> None:
    assert address(domain, "client1") == CLIENT
    with roamed_connection(domain) as (near, far), stopped_leaks_expected(domain):
        damage_is_mended(domain, "ap2", damage, record_property)
        exchange(near, far)
        exchange(far, near)


@pytest.mark.parametrize("damage", AT_THE_ANCHOR.values(), ids=AT_THE_ANCHOR.keys())
def test_routing_at_the_anchor(domain: Lab, damage: str, record_property: Record) -> None:
    with roamed_connection(domain) as (near, far), stopped_leaks_expected(domain):
        damage_is_mended(domain, "ap1", damage, record_property)
        exchange(far, near)
        exchange(near, far)


def test_an_owned_table_survives_what_others_flush(domain: Lab) -> None:
    domain.run("ap2", ["nft", BY_INCLUDE])
    with roamed_connection(domain) as (near, far):
        before, counted = installed(domain, "ap2"), repairs(domain, "ap2")
        for name in ("the ruleset", "what OpenWrt's firewall does at a stop"):
            domain.run("ap2", ["sh", "-c", UNOWNED[name]])
            assert installed(domain, "ap2") == before
            exchange(near, far)
        refused = domain.run("ap2", ["sh", "-c", UNOWNED["the table"]], check=False)
        assert "Operation not permitted" in refused.stderr
        assert repairs(domain, "ap2") == counted


def disown(lab: Lab, *aps: str) -> None:
    """Give APs tables that anybody may change, as on kernels before 6.9."""
    for ap in aps:
        lab.kill_agent(ap)
        lab.run(ap, ["nft", "delete table inet apagent; add table inet apagent"])
        lab.start_agent(ap)


@pytest.mark.parametrize("ap", ["ap1", "ap2"], ids=["anchor", "serving"])
@pytest.mark.parametrize("damage", UNOWNED.values(), ids=UNOWNED.keys())
def test_an_unowned_table(domain: Lab, ap: str, damage: str, record_property: Record) -> None:
    roam(domain, "client1", "ap3")
    disown(domain, ap)
    with roamed_connection(domain) as (near, far), leaks_expected(domain):
        damage_is_mended(domain, ap, damage, record_property)
        exchange(near, far)
        exchange(far, near)
        with (
            listening(domain, "server", SERVER) as listener,
            tcp(domain, "client1", listener.getsockname()),
        ):
            made, (source, _) = accepted(listener)
            made.close()
            assert source == uplink("ap2")


@pytest.mark.parametrize("damage", ELEMENTS.values(), ids=ELEMENTS.keys())
def test_elements_of_an_unowned_table(domain: Lab, damage: str, record_property: Record) -> None:
    roam(domain, "client1", "ap3")
    disown(domain, "ap2")
    with roamed_connection(domain) as (near, far):
        damage_is_mended(domain, "ap2", damage, record_property)
        exchange(near, far)
