"""A client's addresses: several at once, one that moves to another client, a MAC that changes."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Callable, Iterator

import pytest

from apagent.lab.lab import Lab
from tests.netns.conftest import MakeLab
from tests.netns.nat_support import (
    accepted,
    exchange,
    flows,
    forget_flows,
    known_everywhere,
    listening,
    ping,
    roam,
    tcp,
    udp,
)
from tests.netns.observe import SERVER, address, ask, becomes, eventually, mac, tracked, uplink

pytestmark = pytest.mark.netns

LEASE = "10.77.5.5"
SECOND = "10.77.6.6"
PRIVATE_MAC = "02:00:00:00:77:01"
PORT = 40000
"""The former and the new owner use the same ports, so that their flows have the same key."""
SERVER_PORT = 4000
INTERVAL_S, WITHIN_S = 0.02, 1.0
OLD = "0x99"


@pytest.fixture(scope="module")
def domain(module_lab: MakeLab) -> Lab:
    return module_lab(aps=3, clients=2)


@pytest.fixture(autouse=True)
def _at_ap1(domain: Lab) -> Iterator[None]:
    for client in domain.clients:
        roam(domain, client, "ap1")
    forget_flows(domain)
    yield
    for client in domain.clients:
        configure(domain, client, f"{address(domain, client)}/16", mac=mac(domain, client))


def configure(lab: Lab, client: str, *addresses: str, mac: str = "") -> None:
    """Give the client these addresses (with prefix length) instead of its own, and maybe a MAC."""
    lines = ["ip address flush dev wlan0"]
    if mac:
        lines.append(f"ip link set wlan0 down address {mac} up")
    lines += [f"ip address add {added} dev wlan0" for added in addresses]
    if addresses:
        lines.append("ip route replace default via 10.77.0.1")
    lab.run(client, ["sh", "-ec", "\n".join(lines)])


@contextlib.contextmanager
def connection(
    lab: Lab, client: str, source: tuple[str, int]
) -> Iterator[tuple[socket.socket, socket.socket, str]]:
    """A TCP connection to the server: both ends, and where the server sees it come from."""
    with (
        listening(lab, "server", SERVER) as listener,
        tcp(lab, client, listener.getsockname(), source) as near,
    ):
        # Or a former owner would repeat its FIN when it gets its address back.
        near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        far, (seen, _) = accepted(listener)
        with far:
            yield near, far, seen


def test_all_addresses_of_a_client_roam(domain: Lab) -> None:
    own = address(domain, "client1")
    domain.run("client1", ["ip", "address", "add", f"{SECOND}/16", "dev", "wlan0"])
    with (
        connection(domain, "client1", (own, 0)) as first,
        connection(domain, "client1", (SECOND, 0)) as second,
    ):
        known_everywhere(domain, at_least=2)
        for ap in ("ap2", "ap3", "ap1"):
            roam(domain, "client1", ap)
            for near, far, seen in (second, first):
                exchange(far, near)  # the server speaks first: nothing here has told where it is
                exchange(near, far)
                assert seen == uplink("ap1")
        known = ask(domain, "ap2", "client", "show", own)
        assert {own, SECOND} <= set(known["addresses"])


def test_an_address_that_a_client_takes_away_from_home_is_learned(domain: Lab) -> None:
    roam(domain, "client1", "ap2")
    domain.run("client1", ["ip", "address", "add", f"{SECOND}/16", "dev", "wlan0"])
    with connection(domain, "client1", (SECOND, 0)) as (near, far, seen):
        assert seen == uplink("ap2")
        known_everywhere(domain, "--client", SECOND)
        roam(domain, "client1", "ap3")
        exchange(far, near)


class Asker:
    """A client's UDP socket that asks the server all the time where it comes from."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self._client, self._server = client, server
        client.settimeout(INTERVAL_S)
        server.settimeout(INTERVAL_S)
        self._number = 0

    def ask(self) -> tuple[str, bool]:
        """Where the server saw the question come from, and whether the client got the answer.

        Nowhere (empty), if either was lost.
        """
        self._number += 1
        question = f"{id(self)} {self._number}".encode()
        self._client.sendto(question, self._server.getsockname())
        try:
            heard, source = self._server.recvfrom(100)
            while heard != question:
                heard, source = self._server.recvfrom(100)
            self._server.sendto(question, source)
            while self._client.recv(100) != question:
                pass
        except TimeoutError:
            return "", False
        return source[0], True


@contextlib.contextmanager
def asker(lab: Lab, client: str, server: socket.socket) -> Iterator[Asker]:
    with udp(lab, client, LEASE, PORT) as made:
        yield Asker(made, server)


@pytest.mark.parametrize("there", ["ap1", "ap2"], ids=["on the same AP", "on another AP"])
@pytest.mark.parametrize("gone", [True, False], ids=["gone", "staying"])
def test_a_lease_that_moves_leaves_its_sessions_behind(
    domain: Lab, record_property: Callable[[str, object], None], there: str, gone: bool
) -> None:
    with udp(domain, "server", SERVER, SERVER_PORT) as server, contextlib.ExitStack() as former:
        configure(domain, "client1", f"{LEASE}/16")
        before = former.enter_context(asker(domain, "client1", server))
        eventually(lambda: before.ask() == (uplink("ap1"), True))
        source = (LEASE, PORT)
        near, far, _ = former.enter_context(connection(domain, "client1", source))
        former.enter_context(connection(domain, "client1", (LEASE, 0)))
        known_everywhere(domain, at_least=3)
        domain.run("ap1", ["conntrack", "-U", "--orig-src", LEASE, "--mark", OLD])
        assert len(_old(domain, "ap1")) == 3
        if gone:
            domain.run("client1", ["ip", "link", "set", "wlan0", "down"])
        else:
            configure(domain, "client1")

        roam(domain, "client2", there)
        configure(domain, "client2", f"{LEASE}/16")
        after = former.enter_context(asker(domain, "client2", server))
        began = time.monotonic()
        eventually(lambda: after.ask()[1] and not _old(domain, "ap1"))
        took = time.monotonic() - began
        record_property("first_answer_ms", round(took * 1e3, 1))
        assert took < WITHIN_S
        eventually(lambda: after.ask() == (uplink(there), True))
        becomes(lambda: claimed_by(domain, mac(domain, "client2")), {there})
        becomes(lambda: _owners(domain, LEASE), {mac(domain, "client2")})
        # A TCP connection of the former owner's ports is the new one's own, from its AP.
        with connection(domain, "client2", (LEASE, PORT)) as (one, other, seen):
            assert seen == uplink(there)
            exchange(one, other)
        assert {flow.anchor for flow in flows(domain, "ap3", "--client", LEASE)} == {there}
        # What the server still sends to the former owner's connection ends there.
        far.sendall(b"for somebody else")
        with contextlib.suppress(TimeoutError):
            near.settimeout(0.2)
            assert near.recv(100) == b""


def claimed_by(lab: Lab, client_mac: str) -> set[str]:
    """The AP that serves the client, as the APs have it; empty text: one doesn't know."""
    known = [{c["mac"]: c["serving_ap"] for c in ask(lab, ap, "clients")} for ap in lab.aps]
    return {clients.get(client_mac, "") for clients in known}


def _old(lab: Lab, ap: str) -> list[str]:
    """The AP's conntrack entries that were marked (ids are used again)."""
    return lab.run(ap, ["conntrack", "-L", "--mark", OLD]).stdout.splitlines()


def _owners(lab: Lab, at: str) -> set[str]:
    """MACs that the APs take for the owner of the address; those of the neighbour entries."""
    found = {ask(lab, ap, "client", "show", at)["mac"] for ap in lab.aps}
    for ap in lab.aps:
        entry = lab.run(ap, ["ip", "neigh", "show", at, "dev", "br-lan"]).stdout.split()
        found |= {entry[entry.index("lladdr") + 1]} if "PERMANENT" in entry else set()
    return found


def test_a_client_with_a_new_mac_is_a_new_client(domain: Lab) -> None:
    own = address(domain, "client1")
    with udp(domain, "server", SERVER, 0) as server, udp(domain, "client1", own, PORT) as client:
        known = Asker(client, server)
        eventually(lambda: known.ask() == (uplink("ap1"), True))
        known_everywhere(domain)
        old = tracked(domain, "ap1", "client1")
        assert old
        domain.roam("client1", "ap2", silent=True)
        configure(domain, "client1", f"{SECOND}/16", mac=PRIVATE_MAC)
        eventually(lambda: ping(domain, "client1", SERVER)[0])
        becomes(lambda: claimed_by(domain, PRIVATE_MAC), {"ap2"})
        becomes(lambda: claimed_by(domain, mac(domain, "client1")), {"ap1"})
        assert ask(domain, "ap3", "client", "show", SECOND)["addresses"] == [SECOND]
        with connection(domain, "client1", (SECOND, 0)) as (_, _, seen):
            assert seen == uplink("ap2")
            # It may yet come back as it was, and then its session is still there.
            assert tracked(domain, "ap1", "client1")
            configure(domain, "client1", f"{own}/16", mac=mac(domain, "client1"))
            eventually(lambda: known.ask() == (uplink("ap1"), True))


def test_a_client_that_keeps_its_address_under_a_new_mac_starts_anew(domain: Lab) -> None:
    own = address(domain, "client1")
    with udp(domain, "server", SERVER, 0) as server, udp(domain, "client1", own, PORT) as client:
        known = Asker(client, server)
        eventually(lambda: known.ask() == (uplink("ap1"), True))
        known_everywhere(domain)
        domain.roam("client1", "ap2", silent=True)
        configure(domain, "client1", f"{own}/16", mac=PRIVATE_MAC)
        eventually(lambda: known.ask() == (uplink("ap2"), True))
        becomes(lambda: tracked(domain, "ap1", "client1"), [])
