"""Two networks on the same APs: no packet, session or client crosses.

Between two bridges of one AP its firewall decides. Here it is like OpenWrt's with a zone for each
network, which may reach the Internet but not each other; it lets tunnels pass, as ours asks for.
"""

from __future__ import annotations

import contextlib
import functools
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from apagent.lab.capture import Capture, touching
from apagent.lab.lab import Lab
from apagent.lab.plan import NETWORKS
from tests.netns.conftest import MakeLab
from tests.netns.nat_support import (
    accepted,
    exchange,
    known_everywhere,
    listening,
    ping,
    roam,
    tcp,
    udp,
)
from tests.netns.observe import SERVER, address, ask, becomes, eventually, mac, uplink

pytestmark = pytest.mark.netns

LAN, GUEST = NETWORKS
STAFF, VISITOR, COLLEAGUE, OTHER_VISITOR = "client1", "client2", "client3", "client4"
INCLUDE = Path(__file__).parents[2] / "deploy/openwrt/chain-pre/forward/10-apagent.nft"

FIREWALL = """
table inet fw4 {
    chain forward {
        type filter hook forward priority filter; policy drop;
        INCLUDE
        ct state vmap { established : accept, related : accept }
        iifname { "br-lan", "br-guest" } oifname "wan" accept
    }
}
"""


@pytest.fixture(scope="module")
def domain(module_lab: MakeLab) -> Lab:
    made = module_lab(aps=3, clients=4, networks=2)
    include = INCLUDE.read_text().replace('{ "br-lan" }', '{ "br-lan", "br-guest" }')
    for ap in made.aps:
        made.run(ap, ["nft", FIREWALL.replace("INCLUDE", include)])
    return made


@pytest.fixture(autouse=True)
def _apart(domain: Lab) -> None:
    """One client of each network at ap1, the others at ap2, and all of them known."""
    for client, ap in zip(domain.clients, ("ap1", "ap1", "ap2", "ap2"), strict=True):
        roam(domain, client, ap)
        eventually(functools.partial(_answered, domain, client))
    for client in domain.clients:
        becomes(functools.partial(places, domain, client), {net(domain, client)})


def _answered(lab: Lab, client: str) -> bool:
    return ping(lab, client, SERVER)[0] == 1


def net(lab: Lab, client: str) -> str:
    return lab.plan.network(client).name


def places(lab: Lab, client: str) -> set[str]:
    """The networks in which the APs know the client with its address."""
    return {
        known["network"]
        for ap in lab.aps
        for known in ask(lab, ap, "clients")
        if known["mac"] == mac(lab, client) and address(lab, client) in known["addresses"]
    }


@contextlib.contextmanager
def nothing_crosses(lab: Lab) -> Iterator[None]:
    """No packet that has to do with one network is on the other one's radios or links."""
    with contextlib.ExitStack() as stack:
        found = [
            stack.enter_context(Capture(lab.namespace("fabric"), _air(lab, air), touching(other)))
            for air, other in ((LAN, GUEST.prefix), (GUEST, LAN.prefix))
        ]
        yield
        packets = [str(packet) for capture in found for packet in capture.packets()]
        assert [packet for packet in packets if not _from_its_sender(packet)] == []


def _air(lab: Lab, network: object) -> list[str]:
    return [lab.plan.antenna(ap, network).name for ap in lab.aps]  # type: ignore[arg-type]


def _from_its_sender(packet: str) -> bool:
    """A client may send to the other network: what counts is what comes out."""
    source, _, _, _, _, _, interface = packet.split()
    guest = source.startswith("10.78.")
    return guest == interface.startswith("gradio")


def test_sessions_and_clients_stay_in_their_network(domain: Lab) -> None:
    with contextlib.ExitStack() as stack:
        ends = []
        for client in (STAFF, VISITOR):
            listener = stack.enter_context(listening(domain, "server", SERVER))
            near = stack.enter_context(tcp(domain, client, listener.getsockname()))
            far, (source, _) = accepted(listener)
            ends.append((near, stack.enter_context(far)))
            assert source == uplink("ap1")
            known_everywhere(domain, "--client", address(domain, client))
        with nothing_crosses(domain):
            for ap in ("ap2", "ap3", "ap1"):
                for client in (STAFF, VISITOR):
                    roam(domain, client, ap)
                for near, far in ends:
                    exchange(near, far)
        for ap in domain.aps:
            for flow in ask(domain, ap, "flows"):
                assert flow["network"] == (
                    "lan" if flow["client"].startswith("10.77.") else "guest"
                )
        for client in domain.clients:
            assert places(domain, client) == {net(domain, client)}


def test_clients_of_one_network_reach_each_other_over_aps(domain: Lab) -> None:
    with nothing_crosses(domain):
        for client, peer in ((STAFF, COLLEAGUE), (VISITOR, OTHER_VISITOR)):
            assert ping(domain, client, address(domain, peer), count=2)[0] == 2


@pytest.mark.parametrize("there", ["ap1", "ap2"], ids=["on the same AP", "on another AP"])
def test_clients_of_two_networks_do_not(domain: Lab, there: str) -> None:
    with nothing_crosses(domain):
        for client, peer in ((STAFF, OTHER_VISITOR), (VISITOR, COLLEAGUE)):
            roam(domain, peer, there)
            assert ping(domain, client, address(domain, peer), wait_s=0.3)[0] == 0
            with udp(domain, client) as one, receiving(domain, peer) as other:
                send(one, other)
                assert not received(other)


def test_nor_by_a_socket_that_is_anchored_where_the_other_is(domain: Lab) -> None:
    """The way to the anchor is a way around the firewall of the AP in front of it."""
    for client, peer in ((STAFF, OTHER_VISITOR), (VISITOR, COLLEAGUE)):
        with (
            nothing_crosses(domain),
            udp(domain, "server", SERVER, 0) as server,
            udp(domain, client) as one,
            receiving(domain, peer) as other,
        ):
            roam(domain, client, "ap2")
            send(one, server)
            assert server.recvfrom(100)[1][0] == uplink("ap2")
            known_everywhere(domain, "--client", address(domain, client))
            roam(domain, client, "ap1")
            send(one, server)
            assert server.recvfrom(100)[1][0] == uplink("ap2")
            send(one, other)
            assert not received(other)


def test_nor_by_an_address_of_the_other_network(domain: Lab) -> None:
    """A visitor that sends with a colleague's address gets no session in the colleague's name."""
    victim = address(domain, STAFF)
    forged = ["ip", "address", "add", f"{victim}/32", "dev", "wlan0"]
    domain.run(VISITOR, forged)
    try:
        with udp(domain, "server", SERVER, 0) as server, udp(domain, VISITOR, victim, 0) as one:
            server.settimeout(0.3)
            send(one, server)
            assert not received(server)
            for ap in domain.aps:
                assert one.getsockname()[1] not in {
                    flow["client_port"] for flow in ask(domain, ap, "flows")
                }
    finally:
        domain.run(
            VISITOR, [word.replace("add", "del") if word == "add" else word for word in forged]
        )


@contextlib.contextmanager
def receiving(lab: Lab, client: str) -> Iterator[socket.socket]:
    with udp(lab, client, address(lab, client), 0) as made:
        made.settimeout(0.3)
        yield made


def send(one: socket.socket, other: socket.socket) -> None:
    one.sendto(b"hello", other.getsockname())


def received(end: socket.socket) -> bool:
    with contextlib.suppress(TimeoutError):
        return bool(end.recv(100))
    return False
