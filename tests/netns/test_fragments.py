"""Datagrams that don't fit a packet arrive whole, before, during and after a roam."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Self

import pytest

from apagent.lab.lab import Lab
from tests.netns.conftest import MakeLab
from tests.netns.observe import eventually
from tests.netns.packets import Ends, forget_path_mtus, roam, udp_flow

pytestmark = pytest.mark.netns

SIZE = 8000
"""Six fragments on a link with an MTU of 1500; six also in a tunnel with 1450."""
INTERVAL_S = 0.005
QUIET_S = 0.2
DWELL_S = 0.25
PATH = ("ap2", "ap3", "ap1", "ap2")
SO_RCVBUFFORCE = 33
"""asm-generic/socket.h; a reassembled datagram counts twice its size and more."""
IN_FLIGHT_NS = 50_000_000
"""A datagram that was sent so long before a roam may still be under way on a busy machine."""


@pytest.fixture(scope="module")
def domain(module_lab: MakeLab) -> Lab:
    return module_lab(aps=3, clients=1)


@pytest.fixture
def ends(domain: Lab) -> Iterator[Ends]:
    """A flow anchored at ap1. (That no fragment leaks is seen to in every test.)."""
    roam(domain, "client1", "ap1")
    with udp_flow(domain) as flow:
        yield flow
    forget_path_mtus(domain)


def test_large_datagrams_pass_the_tunnel_whole(domain: Lab, ends: Ends) -> None:
    ends.exchange(SIZE)
    for ap in PATH:
        roam(domain, "client1", ap)
        ends.exchange(SIZE)


def test_large_datagrams_go_on_while_the_client_roams(
    domain: Lab, ends: Ends, record_property: Callable[[str, object], None]
) -> None:
    with Stream(ends.client, ends.server) as up, Stream(ends.server, ends.client) as down:
        away = []
        for ap in PATH:
            eventually(lambda: up.flows and down.flows)
            left_ns = time.monotonic_ns() - IN_FLIGHT_NS
            roam(domain, "client1", ap)
            away.append((left_ns, time.monotonic_ns()))
            time.sleep(DWELL_S)
    for direction, stream in (("up", up), ("down", down)):
        assert stream.broken == 0
        lost = stream.lost()
        record_property(f"sent_{direction}", len(stream.sent_ns))
        record_property(f"lost_{direction}", len(lost))
        assert [s for s in lost if not _may_be_lost(stream.sent_ns[s], away)] == []


def _may_be_lost(sent_ns: int, away: list[tuple[int, int]]) -> bool:
    """Whether it was sent before every AP knew where the client had gone."""
    return any(left <= sent_ns <= known for left, known in away)


class Stream(contextlib.AbstractContextManager["Stream"]):
    """Large datagrams in one direction at a fixed rate."""

    def __init__(self, sender: socket.socket, receiver: socket.socket) -> None:
        self._sender, self._receiver = sender, receiver
        self._receiver.settimeout(QUIET_S)
        # Room for a reader that is late: what is counted is what the network loses.
        try:
            self._receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 23)
        except PermissionError:  # in a user namespace: as much as anybody may have
            self._receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 23)
        self.sent_ns: list[int] = []
        self._received: set[int] = set()
        self.broken = 0
        """Datagrams that were not what was sent."""
        self._end = threading.Event()
        self._threads = [threading.Thread(target=work) for work in (self._send, self._receive)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    @property
    def flows(self) -> bool:
        """Whether one of the latest has arrived."""
        latest = len(self.sent_ns) - 4
        return latest >= 0 and any(sequence >= latest for sequence in tuple(self._received))

    def lost(self) -> list[int]:
        """Sequence numbers of those that never arrived."""
        return [s for s in range(len(self.sent_ns)) if s not in self._received]

    def _send(self) -> None:
        while not self._end.wait(INTERVAL_S):
            sequence = len(self.sent_ns)
            self.sent_ns.append(time.monotonic_ns())
            self._sender.send(_datagram(sequence))

    def _receive(self) -> None:
        while True:
            try:
                data = self._receiver.recv(1 << 16)
            except TimeoutError:
                if self._end.is_set():
                    return
                continue
            sequence = int.from_bytes(data[:4], "big")
            self._received.add(sequence)
            self.broken += data != _datagram(sequence)


def _datagram(sequence: int) -> bytes:
    return sequence.to_bytes(4, "big") + random.Random(sequence).randbytes(SIZE - 4)
