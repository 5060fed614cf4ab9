"""Clients of a dead anchor, on a real kernel: one that only listens is reset all the same."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from ipaddress import IPv4Address

import pytest

from apagent.core.model import TCP, Flow, FlowKey
from apagent.kernel.linux import LinuxDataPath
from apagent.kernel.port import Counters
from tests.contract.conftest import GATEWAY_MAC, AccessPoint, run
from tests.contract.flow_support import inside, namespace, run_inside
from tests.contract.test_nft_packets import served_here
from tests.domains import ANN, ANN_IP, BEN, LAN, domain

pytestmark = pytest.mark.netns

SERVER, PORT = IPv4Address("203.0.113.1"), 5001
PATIENCE_S = 5.0
GRACE_S = 0.6
"""How long what a client that has just come sends in mid-connection is dropped, and a bit."""
_CLIENT = f"""
link set lo up
link set client1 arp on address {ANN} up
address add {ANN_IP}/16 dev client1
route add default via 10.77.0.1
neigh add 10.77.0.1 lladdr {GATEWAY_MAC} dev client1
"""
_SERVER = f"""
link set lo up
link set internet up
address add {SERVER}/24 dev internet
"""


class World:
    """An AP that serves Ann, who has a connection with a server."""

    def __init__(self, stack: ExitStack, *, timestamps: bool) -> None:
        client, server = namespace(stack), namespace(stack)
        for pid, device, setup in ((client, "client1", _CLIENT), (server, "internet", _SERVER)):
            run("ip", "link", "set", device, "netns", str(pid))
            run_inside(pid, "ip", "-batch", "-", stdin=setup)
            run_inside(pid, "sysctl", "-qw", f"net.ipv4.tcp_timestamps={int(timestamps)}")
        run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        self.path = stack.enter_context(closing(LinuxDataPath()))
        self.path.prepare(domain())
        self.path.apply({LAN: served_here()})
        listener, self.client = (
            stack.enter_context(inside(pid, lambda: socket.socket(socket.AF_INET)))
            for pid in (server, client)
        )
        listener.bind((str(SERVER), PORT))
        listener.listen()
        self.client.settimeout(PATIENCE_S)
        self.client.bind((str(ANN_IP), PORT))
        self.client.connect((str(SERVER), PORT))
        self.server, _ = listener.accept()
        stack.enter_context(self.server)
        self.flow = Flow(TCP, ANN_IP, PORT, SERVER, PORT).key

    def forget(self) -> None:
        """Nobody translates it any more, as it is with a dead anchor's flows."""
        run("conntrack", "-D", "-s", str(ANN_IP))

    def readable(self, within_s: float) -> bool:
        """Whether the client that waits for data hears anything."""
        return bool(select.select([self.client], [], [], within_s)[0])


@pytest.fixture(params=[True, False], ids=["with timestamps", "without timestamps"])
def world(request: pytest.FixtureRequest, access_point: AccessPoint) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(stack, timestamps=request.param)


def test_a_client_that_only_listens_is_reset_at_once(world: World) -> None:
    world.forget()
    assert not world.readable(GRACE_S)
    began = time.monotonic()
    world.path.poke(LAN, {ANN: [world.flow]})
    with pytest.raises(ConnectionResetError):
        world.client.recv(1)
    assert time.monotonic() - began < 1
    # The second segment finds nobody any more, and what the client says to it is counted too.
    assert world.path.counters() in (Counters(0, 1), Counters(0, 2))


def test_a_flow_that_lives_is_not_harmed(world: World) -> None:
    """It may have found a new anchor meanwhile, or its client uses the ports again."""
    world.server.sendall(b"before")
    assert world.client.recv(6) == b"before"
    world.path.poke(LAN, {ANN: [world.flow]})
    world.client.sendall(b"up")
    world.server.sendall(b"after")
    assert world.client.recv(5) == b"after"


def test_what_a_client_does_not_know_makes_it_send_a_reset(world: World) -> None:
    unknown: FlowKey = Flow(TCP, ANN_IP, 999, SERVER, PORT).key
    world.path.poke(LAN, {ANN: [unknown], BEN: [unknown]})
    assert not world.readable(0.3)
    assert world.path.counters().leaked == 0
