"""Packets in mid-connection that match nothing: their session has ended, or their AP has booted."""

from __future__ import annotations

import contextlib
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Network

import pytest

from apagent.kernel.nft.sets import ARRIVAL_GRACE_MS
from apagent.lab import programs
from apagent.lab.capture import Capture, touching
from apagent.lab.lab import Lab
from tests.netns.conftest import MakeLab
from tests.netns.observe import SERVER, address, ask, eventually, uplink
from tests.netns.packets import (
    anchored,
    anchors,
    port_of,
    roam,
    tcp_connection,
    udp_flow,
)
from tests.netns.sockets import udp_socket

pytestmark = pytest.mark.netns

SYNC_TIMEOUT_S = 2.0
LONG_S = 30.0
"""A sync timeout that doesn't come to its end."""
HELD_S = 1.0
INTERVAL_S = 0.02
END_S = 20.0
_DESTINATION_PORT = 14 + 20 + 2
"""Where it is in a frame; no translation changes it."""


@pytest.fixture(scope="module")
def domain(module_lab: MakeLab) -> Lab:
    return module_lab(aps=2, clients=1)


@pytest.fixture(autouse=True)
def at_home(domain: Lab) -> None:
    """The client begins at ap1."""
    roam(domain, "client1", "ap1")


@pytest.mark.parametrize("last_word", [b"is anybody there?", b""], ids=["data", "end"])
@pytest.mark.parametrize("serving_ap", ["ap1", "ap2"], ids=["at-its-anchor", "through-the-tunnel"])
def test_a_session_that_ended_is_reset(
    domain: Lab, serving_ap: str, last_word: bytes, record_property: Callable[[str, object], None]
) -> None:
    with tcp_connection(domain, "client1") as opened:
        roam(domain, "client1", serving_ap)
        time.sleep(ARRIVAL_GRACE_MS / 1000)
        opened.exchange(b"well so far")
        own = address(domain, "client1")
        domain.run("ap1", ["conntrack", "-D", "-p", "tcp", "--orig-src", own])
        record_property("reset_after_ms", round(reset_after_ms(opened.client, last_word), 1))
        opened.server.setblocking(False)
        with pytest.raises(BlockingIOError):
            opened.server.recv(100)


def test_after_a_reboot_only_what_is_gone_is_reset(
    domain: Lab, record_property: Callable[[str, object], None]
) -> None:
    with (
        tcp_connection(domain, "client1") as peers_tcp,
        udp_flow(domain) as peers_udp,
        arrived_at(domain, "ap2"),
        tcp_connection(domain, "client1") as gone_tcp,
        udp_flow(domain) as gone_udp,
        at_uplink(domain, "ap2") as seen,
    ):
        with stopped(domain, "ap1"), rebooted(domain, "ap2", LONG_S):
            peers_tcp.client.sendall(b"anybody there?")
            send_until(time.monotonic() + HELD_S, peers_udp.client)
            assert not ask(domain, "ap2", "status")["in_sync"]
        domain.agents.wait_ready(["ap2"])
        # It has gone on: none of it was reset, none was translated anew.
        assert peers_tcp.server.recv(100) == b"anybody there?"
        peers_tcp.exchange(b"once in sync")
        drain(peers_udp.server)
        peers_udp.exchange()
        assert not seen() & {port_of(peers_tcp.server), port_of(peers_udp.server)}

        time.sleep(ARRIVAL_GRACE_MS / 1000)
        record_property("reset_after_ms", round(reset_after_ms(gone_tcp.client), 1))
        gone_udp.exchange()
        assert port_of(gone_udp.server) in seen()
        anchored(domain, port_of(gone_udp.client), "ap2")
        assert anchors(domain, "ap2", port_of(gone_tcp.client)) == []


def test_an_ap_that_gets_no_answer_holds_back_for_a_bounded_time(
    domain: Lab, record_property: Callable[[str, object], None]
) -> None:
    with (
        udp_flow(domain) as peers,
        arrived_at(domain, "ap2"),
        at_uplink(domain, "ap2") as seen,
        udp_socket(domain, "client1") as fresh,
        udp_socket(domain, "server", SERVER) as server,
    ):
        fresh.connect(server.getsockname())
        with stopped(domain, "ap1"), rebooted(domain, "ap2", SYNC_TIMEOUT_S) as started:
            # The kernel's timer starts later: all of this is sent while it runs.
            send_until(started + SYNC_TIMEOUT_S, peers.client, fresh)
            server.settimeout(INTERVAL_S)
            source = eventually(lambda: source_of(fresh, server), SYNC_TIMEOUT_S + END_S)
            record_property("new_udp_after_s", round(time.monotonic() - started, 2))
            assert source == uplink("ap2")
            domain.agents.wait_ready(["ap2"])
            assert port_of(peers.server) not in seen()
        drain(peers.server)
        anchored(domain, port_of(peers.client), "ap1")
        peers.exchange()
        assert port_of(peers.server) not in seen()


# --- what happens to the APs


@contextlib.contextmanager
def arrived_at(lab: Lab, ap: str) -> Iterator[None]:
    """The client has come to an AP, and its grace there is over."""
    roam(lab, "client1", ap)
    time.sleep(ARRIVAL_GRACE_MS / 1000)
    yield


@contextlib.contextmanager
def stopped(lab: Lab, ap: str) -> Iterator[None]:
    """The AP's agent gives no answer while the block runs; its kernel forwards."""
    lab.agents.kill(ap, signal.SIGSTOP)
    try:
        yield
    finally:
        lab.agents.kill(ap, signal.SIGCONT)


@contextlib.contextmanager
def rebooted(lab: Lab, ap: str, sync_timeout_s: float) -> Iterator[float]:
    """The AP has lost all it knew, and its radio is on again as soon as it filters packets.

    Gives the time when its agent was started.
    """
    lab.run(ap, ["ip", "link", "set", "wlan0", "down"])
    lab.kill_agent(ap, signal.SIGTERM)
    config = lab.agents.config_file(ap)
    lab.run(ap, [programs.path("apagent"), "cleanup", "--config", str(config)])
    lab.run(ap, ["conntrack", "-F"])
    lab.run(ap, ["ip", "neigh", "flush", "all"])
    option = f"[peering]\nsync_timeout_s = {sync_timeout_s}\n"
    lab.agents.prepare(ap)
    config.write_text(config.read_text().replace("[peering]\n", option))
    started = time.monotonic()
    lab.agents.start(ap)
    eventually(lambda: "leak_guard" in lab.run(ap, ["nft", "list", "ruleset"]).stdout, END_S)
    lab.run(ap, ["ip", "link", "set", "wlan0", "up"])
    yield started


# --- what is seen


@contextlib.contextmanager
def at_uplink(lab: Lab, ap: str) -> Iterator[Callable[[], set[int]]]:
    """The server's ports that the AP's uplink has sent anything to while the block runs."""
    with Capture(lab.namespace("internet"), [ap], touching(IPv4Network(SERVER))) as capture:

        def ports() -> set[int]:
            frames = [packet.frame for packet in capture.packets()]
            to_server = [f for f in frames if f[30:34] == socket.inet_aton(SERVER)]
            return {struct.unpack_from(">H", f, _DESTINATION_PORT)[0] for f in to_server}

        yield ports


def reset_after_ms(near: socket.socket, last_word: bytes = b"is anybody there?") -> float:
    """How long a packet that matches nothing takes to be answered by a reset.

    An empty one says that no more will come (FIN), which conntrack takes for invalid, not for new.
    """
    sent = time.monotonic()
    if last_word:
        near.sendall(last_word)
    else:
        near.shutdown(socket.SHUT_WR)
    with pytest.raises(ConnectionResetError):
        near.recv(100)
    return (time.monotonic() - sent) * 1000


def send_until(deadline: float, *ends: socket.socket) -> None:
    while time.monotonic() < deadline:
        for end in ends:
            end.send(b"is anybody there?")
        time.sleep(INTERVAL_S)


def drain(end: socket.socket) -> None:
    """Take in what has come by now."""
    end.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            end.recv(100)
    end.settimeout(END_S)


def source_of(client: socket.socket, server: socket.socket) -> str:
    """The client's address as the server sees it; empty: nothing comes through."""
    client.send(b"who am I?")
    with contextlib.suppress(TimeoutError):
        return str(server.recvfrom(100)[1][0])
    return ""
