"""A server behind the NAT: forwarded ports of one AP reach their client wherever it is."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from apagent.lab.lab import Lab
from tests.netns.conftest import MakeLab
from tests.netns.nat_support import (
    PATIENCE_S,
    Address,
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
from tests.netns.observe import SERVER, address, eventually, served_by, uplink

pytestmark = pytest.mark.netns

INSIDE, INSIDE_UDP = 80, 5060
OUTSIDE: Address = (uplink("ap1"), 8080)
OUTSIDE_UDP: Address = (uplink("ap1"), 8060)
FORWARDS = f"""
[[networks.forwards]]
port = {OUTSIDE[1]}
client = "10.77.1.1"
client_port = {INSIDE}

[[networks.forwards]]
protocol = "udp"
port = {OUTSIDE_UDP[1]}
client = "10.77.1.1"
client_port = {INSIDE_UDP}
"""
PATH = ("ap2", "ap3", "ap1", "ap3")
IN_A_ROW = 40
CONNECT_S = 0.9
"""A lost SYN or SYN-ACK costs a second (RFC 6298, section 2)."""
RETRIES, RETRY_S = 10, 0.1


@pytest.fixture(scope="module")
def domain(module_lab: MakeLab) -> Lab:
    return module_lab(aps=3, clients=1, options={"ap1": FORWARDS})


@pytest.fixture(autouse=True)
def _at_ap1(domain: Lab) -> None:
    roam(domain, "client1", "ap1")
    assert eventually(lambda: ping(domain, "client1", SERVER)[0])
    forget_flows(domain)


@contextlib.contextmanager
def web_server(lab: Lab) -> Iterator[socket.socket]:
    with listening(lab, "client1", address(lab, "client1"), INSIDE) as listener:
        yield listener


@contextlib.contextmanager
def visit(lab: Lab, listener: socket.socket) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection from outside; the client sees who it is."""
    with tcp(lab, "server", OUTSIDE) as outer:
        inner, source = accepted(listener)
        with inner:
            assert source == outer.getsockname()
            yield outer, inner


def test_tcp_before_across_and_after_roams(domain: Lab) -> None:
    with web_server(domain) as listener, visit(domain, listener) as (outer, inner):
        exchange(outer, inner)
        for ap in PATH:
            known_everywhere(domain, "--client", address(domain, "client1"))
            roam(domain, "client1", ap)
            exchange(outer, inner)
            exchange(inner, outer)
            with visit(domain, listener) as (other_outer, other_inner):
                exchange(other_outer, other_inner)
        assert {flow.anchor for flow in flows(domain, "ap2")} == {"ap1"}


def test_new_connections_dont_wait_for_their_session_to_be_known(
    domain: Lab, record_property: Callable[[str, object], None]
) -> None:
    """The client's SYN-ACK leaves its AP before that has heard of the session."""
    roam(domain, "client1", "ap2")
    took = []
    with web_server(domain) as listener:
        for _ in range(IN_A_ROW):
            began = time.monotonic()
            with visit(domain, listener) as (outer, inner):
                took.append(time.monotonic() - began)
                exchange(outer, inner)
    record_property("connect_ms_max", round(max(took) * 1e3, 1))
    assert max(took) < CONNECT_S


@contextlib.contextmanager
def phone(lab: Lab) -> Iterator[socket.socket]:
    """A UDP server on the client that tells everybody where they come from."""
    ended = threading.Event()
    with udp(lab, "client1", address(lab, "client1"), INSIDE_UDP) as made:
        made.settimeout(RETRY_S)

        def answer() -> None:
            while not ended.is_set():
                with contextlib.suppress(TimeoutError):
                    _, source = made.recvfrom(100)
                    made.sendto(f"{source[0]} {source[1]}".encode(), source)

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield made
        finally:
            ended.set()
            thread.join()


def call(caller: socket.socket) -> None:
    """Ask the client, until the anchor knows where it is; it sees the caller, the caller the AP."""
    caller.settimeout(RETRY_S)
    for _ in range(RETRIES):
        caller.sendto(b"hello", OUTSIDE_UDP)
        with contextlib.suppress(TimeoutError):
            answer, source = caller.recvfrom(100)
            seen, port = answer.decode().split()
            assert ((seen, int(port)), source) == (caller.getsockname(), OUTSIDE_UDP)
            return
    raise AssertionError("nobody answers")


def test_udp_before_across_and_after_roams(domain: Lab) -> None:
    with phone(domain), udp(domain, "server", SERVER, 0) as known:
        call(known)
        for ap in PATH:
            domain.roam("client1", ap)
            call(known)
            served_by(domain, "client1", ap)
            with udp(domain, "server", SERVER, 0) as stranger:
                call(stranger)


def test_what_the_forwarded_socket_sends_itself_leaves_by_the_same_address(domain: Lab) -> None:
    roam(domain, "client1", "ap3")
    inside = (address(domain, "client1"), INSIDE_UDP)
    with udp(domain, "client1", *inside) as own, udp(domain, "server", SERVER, 0) as server:
        server.settimeout(PATIENCE_S)
        own.sendto(b"hello", server.getsockname())
        assert server.recvfrom(100)[1][0] == uplink("ap1")


def test_other_connections_of_the_client_are_anchored_where_it_is(domain: Lab) -> None:
    roam(domain, "client1", "ap3")
    with (
        listening(domain, "server", SERVER) as listener,
        tcp(domain, "client1", listener.getsockname()) as near,
    ):
        far, source = accepted(listener)
        with far:
            exchange(near, far)
            assert source[0] == uplink("ap3")


def test_the_forward_survives_a_restart_of_its_ap(domain: Lab) -> None:
    with web_server(domain) as listener, visit(domain, listener) as (outer, inner):
        known_everywhere(domain, "--client", address(domain, "client1"))
        roam(domain, "client1", "ap2")
        domain.kill_agent("ap1")
        exchange(outer, inner)
        with visit(domain, listener) as (other_outer, other_inner):
            exchange(other_outer, other_inner)
        domain.start_agent("ap1")
        exchange(outer, inner)
        roam(domain, "client1", "ap3")
        exchange(outer, inner)
        with visit(domain, listener) as (other_outer, other_inner):
            exchange(other_outer, other_inner)
