"""A firewall like OpenWrt's and a policy router like mwan3 keep working, and so do roams.

The firewall refuses what it forwards unless a rule lets it pass, and translates after us. It may
learn of our tunnels in two ways: by the include of deploy/openwrt at the head of its forward chain,
or by having the tunnel device in the zone of the client interface, whose rules then hold for both.

The policy router gives every connection a mark of its own, but for what is on a connected network,
and sends some of them out by a second uplink, which is none of ours.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from apagent.lab.lab import Lab
from apagent.lab.plan import UPLINKS
from tests.netns.conftest import MakeLab
from tests.netns.nat_support import (
    SECOND_SERVER,
    Address,
    accepted,
    exchange,
    forget_flows,
    known_everywhere,
    listening,
    ping,
    roam,
    tcp,
    udp,
)
from tests.netns.observe import SERVER, address, uplink

pytestmark = pytest.mark.netns

BLOCKED_PORT, FORWARDED_PORT = 6666, 8080
INCLUDE = Path(__file__).parents[2] / "deploy/openwrt/chain-pre/forward/10-apagent.nft"
FORWARDS = f"""
[[networks.forwards]]
port = {FORWARDED_PORT}
client = "10.77.1.1"
"""
FIREWALL = f"""
table inet fw4 {{
    chain forward {{
        type filter hook forward priority filter; policy drop;
        HEAD
        ct state vmap {{ established : accept, related : accept }}
        iifname ZONE jump forward_lan
        iifname "wan*" jump forward_wan
        jump handle_reject
    }}
    chain forward_lan {{
        meta l4proto {{ tcp, udp }} th dport {BLOCKED_PORT} jump handle_reject
        oifname "wan*" accept
        oifname ZONE accept
    }}
    chain forward_wan {{
        ct status dnat accept
    }}
    chain handle_reject {{
        meta l4proto tcp reject with tcp reset
        reject
    }}
    chain srcnat {{
        type nat hook postrouting priority srcnat; policy accept;
        oifname "wan*" masquerade
    }}
}}
"""
# Without a redirect of its own, fw4's zone of the uplink has no rule for what DNAT has let in.
BY_INCLUDE = (
    FIREWALL.replace("HEAD", f'include "{INCLUDE}"')
    .replace("ZONE", '"br-lan"')
    .replace("ct status dnat accept", "")
)
BY_ZONE = FIREWALL.replace("HEAD", "").replace("ZONE", '{ "br-lan", "apv-lan" }')

FIRST, SECOND, MASK = 0x100, 0x200, 0x3F00
MWAN3 = f"""
table ip mwan3 {{
    set connected {{
        type ipv4_addr
        flags interval
        elements = {{ 10.77.0.0/16, 10.99.0.0/24, 203.0.113.0/24 }}
    }}
    chain prerouting {{
        type filter hook prerouting priority mangle; policy accept;
        meta mark & {MASK} == 0 ip daddr @connected meta mark set meta mark | {MASK}
        meta mark & {MASK} == 0 ct mark & {MASK} == {FIRST} meta mark set meta mark | {FIRST}
        meta mark & {MASK} == 0 ct mark & {MASK} == {SECOND} meta mark set meta mark | {SECOND}
        meta mark & {MASK} == 0 ip daddr {SECOND_SERVER} meta mark set meta mark | {SECOND}
        meta mark & {MASK} == 0 meta mark set meta mark | {FIRST}
        meta mark & {MASK} != {MASK} ct mark set meta mark & {MASK}
    }}
}}
"""
ROUTING = f"""
ip address add ADDRESS/32 dev wan2
ip link set wan2 up
ip route add default via 203.0.113.1 dev wan table 1
ip route add default via 203.0.113.1 dev wan2 onlink table 2
ip rule add priority 1001 iif wan lookup main
ip rule add priority 1002 iif wan2 lookup main
ip rule add priority 2001 fwmark {FIRST}/{MASK} lookup 1
ip rule add priority 2002 fwmark {SECOND}/{MASK} lookup 2
"""
PATH = ("ap2", "ap3", "ap1")


@pytest.fixture(scope="module")
def domain(module_lab: MakeLab) -> Lab:
    return module_lab(aps=3, clients=1, options={"ap1": FORWARDS})


@pytest.fixture(autouse=True)
def _at_ap1(domain: Lab) -> None:
    roam(domain, "client1", "ap1")
    forget_flows(domain)


@pytest.fixture(params=[BY_INCLUDE, BY_ZONE], ids=["by include", "by zone"])
def guarded(request: pytest.FixtureRequest, domain: Lab) -> Iterator[Lab]:
    """Every AP has a firewall."""
    with rules(domain, request.param, "inet fw4"):
        yield domain


@contextlib.contextmanager
def rules(lab: Lab, ruleset: str, table: str) -> Iterator[None]:
    for ap in lab.aps:
        lab.run(ap, ["nft", ruleset])
    try:
        yield
    finally:
        for ap in lab.aps:
            lab.run(ap, ["nft", f"delete table {table}"])


@contextlib.contextmanager
def connection(
    lab: Lab, to: str = SERVER, port: int = 0
) -> Iterator[tuple[socket.socket, socket.socket, str]]:
    """A TCP connection from the client; both ends and where it seems to come from."""
    with (
        listening(lab, "server", to, port) as listener,
        tcp(lab, "client1", listener.getsockname()) as near,
    ):
        far, (source, _) = accepted(listener)
        with far:
            exchange(near, far)
            yield near, far, source


def heard_from(client: socket.socket, server: socket.socket) -> str:
    """Where a datagram comes from, which is answered."""
    client.sendto(b"hello", server.getsockname())
    _, source = server.recvfrom(100)
    server.sendto(b"hello", source)
    assert client.recv(100) == b"hello"
    return str(source[0])


def test_everything_passes_a_firewall_that_refuses_by_default(guarded: Lab) -> None:
    with (
        connection(guarded) as (near, far, source),
        udp(guarded, "server", SERVER, 0) as server,
        udp(guarded, "client1") as client,
        udp(guarded, "server", SECOND_SERVER, 0) as other_server,
    ):
        assert (source, heard_from(client, server)) == (uplink("ap1"), uplink("ap1"))
        for ap in PATH:
            known_everywhere(guarded, at_least=2)
            roam(guarded, "client1", ap)
            exchange(near, far)
            exchange(far, near)
            assert heard_from(client, server) == uplink("ap1")
            assert heard_from(client, other_server) == uplink("ap1")
            assert ping(guarded, "client1", SERVER)[0] == 1
            with connection(guarded) as (_, _, new_source):
                assert new_source == uplink(ap)


def test_a_forwarded_port_passes_too(guarded: Lab) -> None:
    outside: Address = (uplink("ap1"), FORWARDED_PORT)
    with listening(guarded, "client1", address(guarded, "client1"), FORWARDED_PORT) as listener:
        for ap in ("ap1", *PATH):
            roam(guarded, "client1", ap)
            with tcp(guarded, "server", outside) as outer:
                inner, source = accepted(listener)
                with inner:
                    assert source == outer.getsockname()
                    exchange(outer, inner)


def test_what_the_firewall_refuses_is_refused_everywhere(guarded: Lab) -> None:
    with listening(guarded, "server", SERVER, BLOCKED_PORT):
        for ap in ("ap1", *PATH):
            roam(guarded, "client1", ap)
            with (
                pytest.raises(ConnectionRefusedError),
                tcp(guarded, "client1", (SERVER, BLOCKED_PORT)),
            ):
                pass


def test_a_zone_with_the_tunnel_in_it_refuses_also_what_comes_out_of_it(domain: Lab) -> None:
    """A datagram of a socket that is anchored elsewhere meets the rules of its anchor."""
    with (
        rules(domain, BY_ZONE, "inet fw4"),
        udp(domain, "server", SERVER, 0) as server,
        udp(domain, "server", SERVER, BLOCKED_PORT) as blocked,
        udp(domain, "client1") as client,
    ):
        assert heard_from(client, server) == uplink("ap1")
        known_everywhere(domain)
        roam(domain, "client1", "ap2")
        client.sendto(b"hello", blocked.getsockname())
        assert heard_from(client, server) == uplink("ap1")
        blocked.settimeout(0)
        with pytest.raises(BlockingIOError):
            blocked.recv(100)


@pytest.fixture
def policy_routed(domain: Lab) -> Iterator[Lab]:
    """Every AP has a firewall, a second uplink and a policy router."""
    for ap in domain.aps:
        peer = f"{ap}b"
        internet = domain.namespace("internet")
        argv = f"ip link add wan2 type veth peer name {peer} netns {internet}"
        domain.run(ap, argv.split())
        domain.run("internet", ["ip", "link", "set", peer, "master", "uplinks", "up"])
        for line in ROUTING.replace("ADDRESS", second_uplink(ap)).strip().splitlines():
            domain.run(ap, line.split())
    with rules(domain, BY_INCLUDE, "inet fw4"), rules(domain, MWAN3, "ip mwan3"):
        yield domain


def second_uplink(ap: str) -> str:
    return str(UPLINKS[100 + int(ap.removeprefix("ap"))])


def test_connections_keep_to_the_uplink_that_the_policy_gives_them(policy_routed: Lab) -> None:
    lab = policy_routed
    with (
        connection(lab) as first,
        connection(lab, SECOND_SERVER) as second,
        udp(lab, "server", SECOND_SERVER, 0) as server,
        udp(lab, "client1") as client,
    ):
        assert (first[2], second[2]) == (uplink("ap1"), second_uplink("ap1"))
        assert heard_from(client, server) == second_uplink("ap1")
        for ap in PATH:
            known_everywhere(lab, at_least=3)
            roam(lab, "client1", ap)
            for near, far, _ in (first, second):
                exchange(near, far)
                exchange(far, near)
            assert heard_from(client, server) == second_uplink("ap1")
            with connection(lab, SECOND_SERVER) as (_, _, source):
                assert source == second_uplink(ap)
            with connection(lab) as (_, _, source):
                assert source == uplink(ap)
