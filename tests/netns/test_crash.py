"""An agent is killed at every step of its work: nothing that is forwarded stops, nothing is left.

Three APs, and a client at ap2 with flows that are anchored at ap1 and at ap2, each of them in use
all the time. An agent dies at a given step (`crashing`). What follows is the same each time:
another one starts and is in sync, all is as it was, no flow has ended, and nobody has touched the
elements of these flows in the other APs' maps.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from apagent.cli import agent as apagent_command
from apagent.lab import namespaces
from apagent.lab.errors import LabError
from apagent.lab.lab import Lab
from apagent.lab.plan import SECOND_SERVER_ADDRESS
from apagent.lab.traffic.running import serving
from tests.netns import crashing
from tests.netns.conftest import MakeLab
from tests.netns.deaths import (
    every_step,
    make_mortal,
    plan,
    some,
    start_to_die,
    tell_to_die,
    wait_died,
)
from tests.netns.map_changes import MapChanges
from tests.netns.observe import agreed, ask, becomes, eventually, served_by
from tests.netns.observe import sessions as known_sessions
from tests.netns.sockets import udp_socket
from tests.netns.steady import ANSWER_S, Steady, steady
from tests.netns.test_restart import states

pytestmark = pytest.mark.netns

CLIENT, LISTENER = "client1", "client2"
MENDED_S = 20.0
"""Flows that were elsewhere stay in conntrack there for some seconds."""
NOISE = 3
"""Packets of a flow that a busy machine may lose or delay while nothing is wrong."""
OTHER_SERVER, FIRST_PORT = str(SECOND_SERVER_ADDRESS), 20000
MANY = 1500
"""Flows that come and go, in more than one message and one transaction."""


@dataclass(frozen=True, slots=True)
class Domain:
    """The lab, its traffic, and what it looks like when nothing is going on."""

    lab: Lab
    traffic: Steady
    quiet: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def domain(module_lab: MakeLab) -> Iterator[Domain]:
    with in_use(module_lab(aps=3, clients=2)) as made:
        yield made


@contextlib.contextmanager
def in_use(lab: Lab) -> Iterator[Domain]:
    """A lab with flows at two anchors, and agents that can be told to die."""
    limit_retransmission_time(lab)
    with serving(lab), steady(lab, CLIENT) as traffic:
        traffic.add("at ap1")
        becomes(lambda: len(known_sessions(lab, "ap3")), 3)
        lab.roam(CLIENT, "ap2")
        served_by(lab, CLIENT, "ap2")
        lab.roam(LISTENER, "ap2")
        served_by(lab, LISTENER, "ap2")
        lab.run(LISTENER, ["ping", "-c1", OTHER_SERVER])
        end_flows(lab)
        traffic.add("at ap2")
        becomes(lambda: len(known_sessions(lab, "ap3")), 6)
        for ap in lab.aps:
            make_mortal(lab, ap)
            lab.kill_agent(ap)
            lab.start_agent(ap)
        agreed(lab)
        time.sleep(0.6)  # a client's grace has ended
        yield Domain(lab, traffic, states(lab))


def limit_retransmission_time(lab: Lab) -> None:
    """A TCP connection that was cut off goes on within a second, where the kernel can (6.15)."""
    for node in (CLIENT, "server"):
        with namespaces.inside(lab.namespace(node)), contextlib.suppress(LabError):
            namespaces.set_sysctl("ipv4/tcp_rto_max_ms", 1000)


@contextlib.contextmanager
def as_before(
    domain: Domain, ap: str, *, may_lose: bool = False, may_move: bool = False
) -> Iterator[None]:
    """After the block, in which the agent of `ap` dies and comes back, all is as it was.

    With `may_lose` packets are lost until then: the client has come or gone while nobody was there.
    With `may_move` flows were anchored elsewhere until then.
    """
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        watched = {other: MapChanges(domain.lab, other) for other in domain.lab.aps if other != ap}
        for changes in watched.values():
            stack.callback(changes.close)
        yield
        becomes(lambda: states(domain.lab), domain.quiet, MENDED_S)
        becomes(lambda: set(domain.traffic.lately_lost().values()), {0})
        becomes(lambda: [_trouble(domain.lab, each) for each in domain.lab.aps], [([], 0)] * 3)
        agreed(domain.lab)
        mended = time.monotonic()
        touched = {other: changes.of_present() for other, changes in watched.items()}
    time.sleep(ANSWER_S)
    since = mended if may_lose else began
    lost = domain.traffic.lost(since, time.monotonic() - ANSWER_S)
    assert domain.traffic.ended() == {}
    assert {name: count for name, count in lost.items() if count > NOISE} == {}
    assert may_move or touched == {other: [] for other in watched}


def _trouble(lab: Lab, ap: str) -> tuple[list[str], int]:
    status = ask(lab, ap, "status")
    return status["degraded"], status["repairs"]


# Start


STARTS = (
    ("ap1", "after 1 apagent.kernel.nft.table:NftTable._own"),
    ("ap2", "after 1 apagent.agent:Agent.adopt"),
    ("ap1", "after 1 apagent.control.server:ControlServer.start"),
    ("ap1", "after 2 apagent.peers.follower:Follower.take_untrusted"),
    ("ap1", "before 1 apagent.peers.publisher:Publisher.news"),
    ("ap2", "before 1 apagent.kernel.linux:LinuxDataPath.release_hold"),
    ("ap1", "after 1 apagent.kernel.linux:LinuxDataPath.read"),
    ("ap2", "before 1 apagent.kernel.tunnel:prepare_tunnels"),
    ("ap2", "before 1 apagent.reconcile:Reconciler.align"),
    ("ap2", "after 1 apagent.peers.server:PeerFeedServer.start"),
    ("ap2", "before 2 apagent.core.engine:Engine._hear"),
    ("ap2", "after 1 apagent.kernel.linux:LinuxDataPath.release_hold"),
)


@pytest.mark.parametrize(("ap", "step"), some(STARTS, 6))
def test_it_dies_while_it_starts(domain: Domain, ap: str, step: str) -> None:
    with as_before(domain, ap):
        domain.lab.kill_agent(ap)
        start_to_die(domain.lab, ap, step)
        domain.lab.start_agent(ap)


SAMPLE = (2, 3, 11, 18)


def test_it_dies_after_each_change_of_a_first_start(domain: Domain) -> None:
    """An AP without anything of ours in its kernel, as after a reboot."""
    ap = "ap3"
    for number in range(1, 100) if every_step() else SAMPLE:
        with as_before(domain, ap):
            domain.lab.kill_agent(ap)
            clean_up(domain.lab, ap)
            plan(domain.lab, ap).write_text(f"after {number} {crashing.CHANGES}", encoding="ascii")
            domain.lab.agents.start(ap)
            with contextlib.suppress(LabError):
                domain.lab.agents.wait_ready([ap])
                break
            wait_died(domain.lab, ap)
            domain.lab.start_agent(ap)
    assert number >= SAMPLE[-1]


def clean_up(lab: Lab, ap: str) -> None:
    with namespaces.inside(lab.namespace(ap)):
        assert apagent_command.main(["cleanup", "--config", str(lab.agents.config_file(ap))]) == 0


# Flows come and go


BATCHES = (
    ("ap2", "before 1 apagent.core.feed:FeedLog.append"),
    ("ap2", "after 1 apagent.core.feed:FeedLog.since"),
    ("ap1", "before 1 apagent.kernel.nft.table:NftTable._transact"),
    ("ap3", "after 2 apagent.kernel.nft.table:NftTable._transact"),
    ("ap2", "before 1 apagent.core.engine:Engine.step"),
    ("ap2", "after 1 apagent.core.feed:FeedLog.append"),
    ("ap1", "after 1 apagent.peers.follower:Follower.take_untrusted"),
)


@pytest.mark.parametrize(("ap", "step"), some(BATCHES, 4))
def test_it_dies_while_flows_come_and_go(domain: Domain, ap: str, step: str) -> None:
    with as_before(domain, ap):
        tell_to_die(domain.lab, ap, step)
        open_flows(domain.lab)
        wait_died(domain.lab, ap)
        domain.lab.start_agent(ap)
        becomes(lambda: [flows_known(domain.lab, other) for other in domain.lab.aps], [MANY] * 3)
        agreed(domain.lab)
        tell_to_die(domain.lab, ap, step)
        end_flows(domain.lab)
        wait_died(domain.lab, ap)
        domain.lab.start_agent(ap)


def open_flows(lab: Lab) -> None:
    with udp_socket(lab, CLIENT) as client:
        for port in range(FIRST_PORT, FIRST_PORT + MANY):
            client.sendto(b"", (OTHER_SERVER, port))


def end_flows(lab: Lab) -> None:
    for ap in lab.aps:
        lab.run(ap, ["conntrack", "-D", "-d", OTHER_SERVER], check=False)


def flows_known(lab: Lab, ap: str) -> int:
    return sum(session.remote == OTHER_SERVER for session in known_sessions(lab, ap))


# The client roams


ROAMS = (
    ("ap3", "before 1 apagent.kernel.linux:LinuxDataPath.apply"),
    ("ap3", "after 1 apagent.kernel.wire:Netlink._send_acknowledged"),
    ("ap3", "after 1 apagent.core.feed:FeedLog.append"),
    ("ap2", "after 1 apagent.kernel.wire:Netlink._send_acknowledged"),
    ("ap2", "before 1 apagent.kernel.linux:LinuxDataPath.forget_client"),
    ("ap1", "before 1 apagent.kernel.linux:LinuxDataPath.apply"),
    ("ap3", "after 1 apagent.kernel.linux:LinuxDataPath.apply"),
    ("ap3", "before 1 apagent.kernel.linux:LinuxDataPath.welcome_client"),
    ("ap2", "before 1 apagent.kernel.linux:LinuxDataPath.apply"),
    ("ap2", "after 1 apagent.kernel.linux:LinuxDataPath.forget_client"),
    ("ap1", "after 1 apagent.kernel.linux:LinuxDataPath.apply"),
)


@pytest.mark.parametrize(("ap", "step"), some(ROAMS, 6))
def test_it_dies_while_the_client_roams(domain: Domain, ap: str, step: str) -> None:
    with as_before(domain, ap, may_lose=True):
        tell_to_die(domain.lab, ap, step)
        domain.lab.roam(CLIENT, "ap3")
        wait_died(domain.lab, ap)
        back_at_home(domain, ap)


@pytest.mark.parametrize("ap", ["ap1", "ap2", "ap3"], ids=["anchor", "left", "entered"])
def test_the_client_roams_while_nobody_is_there(domain: Domain, ap: str) -> None:
    with as_before(domain, ap, may_lose=True):
        domain.lab.kill_agent(ap)
        domain.lab.roam(CLIENT, "ap3")
        back_at_home(domain, ap)


def back_at_home(domain: Domain, ap: str) -> None:
    """An agent starts again, all see the client at ap3 and nothing is lost; then it goes home."""
    domain.lab.start_agent(ap)
    served_by(domain.lab, CLIENT, "ap3")
    agreed(domain.lab)
    becomes(lambda: set(domain.traffic.lately_lost().values()), {0})
    domain.lab.roam(CLIENT, "ap2")
    served_by(domain.lab, CLIENT, "ap2")


def test_a_client_that_only_listens_roams_while_nobody_is_there(domain: Domain) -> None:
    lab, nobody_at = domain.lab, "ap3"
    with (
        as_before(domain, nobody_at),
        udp_socket(lab, "server", OTHER_SERVER) as server,
        udp_socket(lab, LISTENER) as listener,
    ):
        listener.sendto(b"what is new?", server.getsockname())
        _, subscriber = server.recvfrom(100)
        becomes(lambda: [flows_known(lab, ap) for ap in lab.aps], [1] * 3)
        lab.kill_agent(nobody_at)
        lab.roam(LISTENER, nobody_at)
        lab.start_agent(nobody_at)
        listener.setblocking(False)
        eventually(lambda: _heard(listener, server, subscriber))
        lab.roam(LISTENER, "ap2")
        served_by(lab, LISTENER, "ap2")
        end_flows(lab)


def _heard(listener: socket.socket, server: socket.socket, subscriber: tuple[str, int]) -> bytes:
    server.sendto(b"news", subscriber)
    time.sleep(0.01)
    with contextlib.suppress(BlockingIOError):
        return listener.recv(100)
    return b""


# Stop


STOPS = (
    ("ap2", "before 1 apagent.upkeep:Upkeep.close"),
    ("ap1", "before 1 apagent.app:notify"),
    ("ap1", "after 1 apagent.kernel.linux:LinuxDataPath.close"),
)


@pytest.mark.parametrize(("ap", "step"), some(STOPS, 1))
def test_it_dies_while_it_stops(domain: Domain, ap: str, step: str) -> None:
    with as_before(domain, ap):
        tell_to_die(domain.lab, ap, step)
        domain.lab.agents.kill(ap, signal.SIGTERM)
        wait_died(domain.lab, ap)
        domain.lab.start_agent(ap)
