"""Port forwards go with their NAT address, and so do the flows that they have let in."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pytest

from apagent import flow_ends
from apagent.lab.faults import Faults
from apagent.lab.lab import Lab
from tests.netns.conftest import MakeLab
from tests.netns.nat_support import (
    ANY,
    Address,
    accepted,
    exchange,
    flows,
    listening,
    ping,
    roam,
    set_timeouts,
    tcp,
    udp,
)
from tests.netns.observe import (
    SERVER,
    Session,
    address,
    ask,
    becomes,
    elements,
    eventually,
    host_routes,
    sessions,
)
from tests.netns.test_dead_anchors import holders, nat

pytestmark = pytest.mark.netns

DRAINED_S = 20.0
"""Former entries stay for some seconds."""
CLIENT = "client1"
WEB, PHONE = 80, 5060
OUTSIDE_WEB, OUTSIDE_PHONE = 8080, 8060
FORWARDS = f"""
successor = "ap2"

[[networks.forwards]]
port = {OUTSIDE_WEB}
client = "10.77.1.1"
client_port = {WEB}

[[networks.forwards]]
protocol = "udp"
port = {OUTSIDE_PHONE}
client = "10.77.1.1"
client_port = {PHONE}
"""
HOME_S = 20.0
MOVED_S = 10.0
TRIES = 30
IDLE_S = flow_ends.MOVED_S + 2.0
"""Longer than the former holder keeps what has moved."""
ROAMS = ("ap2", "ap3")


@dataclass(frozen=True, slots=True)
class Flows:
    """A TCP connection and a UDP exchange that came in by forwarded ports, both ends of each."""

    outer: socket.socket
    inner: socket.socket
    caller: socket.socket
    phone: socket.socket

    def go_on(self) -> bool:
        """Both ends speak, either one first, and see the other's address as ever."""
        exchange(self.outer, self.inner)
        exchange(self.inner, self.outer)
        for _ in range(2):
            self._answer_a_call()
        return True

    def call(self) -> Address:
        """The first datagram, from outside; whom the client sees."""
        to = self.caller.getpeername()
        self.caller.send(b"hello")
        data, source = self.phone.recvfrom(100)
        assert (data, to[1]) == (b"hello", OUTSIDE_PHONE)
        return str(source[0]), int(source[1])

    def _answer_a_call(self) -> None:
        self.phone.sendto(b"answer", self.call())
        assert self.caller.recv(100) == b"answer"


@contextlib.contextmanager
def let_in(lab: Lab) -> Iterator[tuple[Flows, socket.socket]]:
    """Such flows, and the client's listener."""
    inside, outside = address(lab, CLIENT), nat(lab, "ap1")
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(listening(lab, CLIENT, inside, WEB))
        outer = stack.enter_context(tcp(lab, "server", (outside, OUTSIDE_WEB)))
        inner = stack.enter_context(accepted(listener)[0])
        phone = stack.enter_context(udp(lab, CLIENT, inside, PHONE))
        caller = stack.enter_context(udp(lab, "server", SERVER, 0))
        caller.connect((outside, OUTSIDE_PHONE))
        made = Flows(outer, inner, caller, phone)
        assert made.go_on()
        yield made, listener


def lets_in(lab: Lab, listener: socket.socket) -> bool:
    """A new connection and a new caller from outside reach the client, and are answered."""
    outside = nat(lab, "ap1")
    with tcp(lab, "server", (outside, OUTSIDE_WEB)) as outer:
        inner, source = accepted(listener)
        with inner:
            assert source == outer.getsockname()
            exchange(inner, outer)
    return True


def refused(lab: Lab, to: str) -> bool:
    """Nothing is forwarded there."""
    with pytest.raises(ConnectionRefusedError), tcp(lab, "server", (to, OUTSIDE_WEB)):
        pass
    return True


def is_at(lab: Lab, ap: str, moved: Flows, *, without: str = "") -> bool:
    """The address, its forwards and what they have let in are at one AP: all agents say so.

    And its kernel alone lets in. `without` is dead.
    """
    becomes(lambda: holders(lab, "ap1"), [ap], HOME_S)
    alive = [other for other in lab.aps if other != without]
    everything = {key: {ap} for key in _keys(moved)}
    for other in alive:
        becomes(partial(_anchors, lab, other, moved, alive), everything, MOVED_S)
    outside = {(nat(lab, "ap1"), "tcp", OUTSIDE_WEB), (nat(lab, "ap1"), "udp", OUTSIDE_PHONE)}
    for other in alive:
        there = {tuple(key["concat"]) for key, _ in elements(lab, other, "lan_forwards")}
        assert there == (outside if other == ap else set())
    return True


Key = tuple[str, int, str, int]


def _keys(moved: Flows) -> set[Key]:
    """Protocol, client's port, remote and its port: of the flows and of the forwards."""
    return {
        ("tcp", WEB, *moved.outer.getsockname()),
        ("udp", PHONE, *moved.caller.getsockname()),
        ("tcp", WEB, ANY, OUTSIDE_WEB),
        ("udp", PHONE, ANY, OUTSIDE_PHONE),
    }


def _anchors(lab: Lab, ap: str, moved: Flows, alive: Collection[str]) -> dict[Key, set[str]]:
    """Which of the living anchor them, as an agent knows."""
    found: dict[Key, set[str]] = {}
    for known in sessions(lab, ap):
        key = (known.protocol, known.client_port, known.remote, known.remote_port)
        if key in _keys(moved) and known.anchor in alive:
            found.setdefault(key, set()).add(known.anchor)
    return found


def anchored(lab: Lab, ap: str) -> int:
    """How many flows an AP anchors, as `apctl status` says."""
    (anchor,) = ask(lab, ap, "status")["anchors"]
    return int(anchor["flows"])


def domain(make: MakeLab) -> Lab:
    """ap1 has forwards and is succeeded by ap2; the client is at ap3."""
    made = make(aps=3, clients=1, takeover=True, options={"ap1": FORWARDS})
    for ap in made.aps:
        becomes(partial(holders, made, ap), [ap])
    roam(made, CLIENT, "ap3")
    assert eventually(lambda: ping(made, CLIENT, SERVER)[0])
    becomes(lambda: host_routes(made, "ap1") & host_routes(made, "ap2"), {address(made, CLIENT)})
    return made


def test_they_move_with_a_drain_and_come_back(lab: MakeLab) -> None:
    made = domain(lab)
    with let_in(made) as (moved, listener):
        assert is_at(made, "ap1", moved)
        assert anchored(made, "ap1") == 2
        made.run("ap1", ["apctl", "drain", "--wait", "--timeout", "10"])
        assert is_at(made, "ap2", moved)
        assert moved.go_on()
        assert lets_in(made, listener)
        time.sleep(IDLE_S)
        for ap in ROAMS:
            roam(made, CLIENT, ap)
            assert moved.go_on()
            assert lets_in(made, listener)
        assert refused(made, nat(made, "ap2"))

        made.run("ap1", ["apctl", "undrain"])
        made.run("ap1", ["apctl", "reclaim"])
        assert is_at(made, "ap1", moved)
        time.sleep(IDLE_S)
        assert moved.go_on()
        assert lets_in(made, listener)
        assert moved.go_on()


def test_they_survive_the_death_of_their_anchor(lab: MakeLab) -> None:
    made = domain(lab)
    faults = Faults(made)
    with let_in(made) as (moved, listener):
        assert is_at(made, "ap1", moved)
        faults.power_off("ap1")
        # The first segment is sent while nobody is there who would translate it.
        exchange(moved.outer, moved.inner)
        assert is_at(made, "ap2", moved, without="ap1")
        assert moved.go_on()
        assert lets_in(made, listener)
        made.kill_agent("ap2")
        assert lets_in(made, listener)
        made.start_agent("ap2")
        assert is_at(made, "ap2", moved, without="ap1")
        assert lets_in(made, listener)

        faults.power_on("ap1")
        made.run("ap1", ["apctl", "reclaim"])
        assert is_at(made, "ap1", moved)
        assert moved.go_on()
        assert lets_in(made, listener)


def test_what_is_idle_stays_and_whoever_speaks_first_is_heard(lab: MakeLab) -> None:
    """One AP dies after the other, and nobody has said anything in between."""
    made = domain(lab)
    faults = Faults(made)
    with let_in(made) as (moved, _):
        assert is_at(made, "ap1", moved)
        faults.power_off("ap1")
        assert is_at(made, "ap2", moved, without="ap1")
        faults.power_on("ap1")
        made.run("ap1", ["apctl", "reclaim"])
        assert is_at(made, "ap1", moved)
        moved.phone.sendto(b"answer", moved.caller.getsockname())
        assert moved.caller.recv(100) == b"answer"
        exchange(moved.inner, moved.outer)


def test_new_connections_come_through_while_the_address_moves(lab: MakeLab) -> None:
    """One after the other; a SYN that finds nobody is sent again in a second."""
    made = domain(lab)
    with let_in(made) as (moved, listener), ThreadPoolExecutor(1) as operator:
        for argv, there in (
            (("drain", "--wait"), "ap2"),
            (("undrain",), ""),
            (("reclaim",), "ap1"),
        ):
            moving = operator.submit(made.run, "ap1", ["apctl", *argv])
            for _ in range(TRIES):
                assert lets_in(made, listener)
            moving.result(DRAINED_S)
            if there:
                assert is_at(made, there, moved)
        assert moved.go_on()


def test_an_end_is_noticed_where_the_flow_is_now(lab: MakeLab) -> None:
    made = domain(lab)
    set_timeouts(made, 1, "tcp_timeout_time_wait", "tcp_timeout_close", "tcp_timeout_last_ack")
    with let_in(made) as (moved, _):
        made.run("ap1", ["apctl", "drain", "--wait", "--timeout", "10"])
        assert is_at(made, "ap2", moved)
        moved.outer.shutdown(socket.SHUT_WR)
        moved.inner.shutdown(socket.SHUT_WR)
        for ap in made.aps:
            becomes(partial(_connections, made, ap), set(), HOME_S)


def _connections(lab: Lab, ap: str) -> set[Session]:
    return {flow for flow in flows(lab, ap) if flow.protocol == "tcp"}
