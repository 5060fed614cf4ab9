"""Flows that are opened just before a roam, and what becomes of them on every AP."""

from __future__ import annotations

import contextlib
import re
import select
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Self

from apagent.lab import namespaces
from apagent.lab.lab import Lab
from tests.netns.nat_support import PATIENCE_S, listening, udp
from tests.netns.observe import SERVER, address, agreed, ask, becomes, eventually, mac, tracked

_TRACKED = re.compile(r"^(\w+) .*? src=\S+ dst=(\S+) sport=(\d+) dport=(\d+) ")


class Flow(NamedTuple):
    """A client's flow."""

    protocol: str
    client_port: int
    remote: str
    remote_port: int


@contextlib.contextmanager
def stopped(lab: Lab, *aps: str) -> Iterator[None]:
    """Hold agents for the length of the block; their kernels go on."""
    for ap in aps:
        lab.agents.kill(ap, signal.SIGSTOP)
    try:
        yield
    finally:
        for ap in aps:
            lab.agents.kill(ap, signal.SIGCONT)


def known_to(lab: Lab, client: str, ap: str, *judges: str) -> None:
    """Wait until the agents of `judges` know where the client is."""

    def known(judge: str) -> str:
        places = {each["mac"]: each["serving_ap"] for each in ask(lab, judge, "clients")}
        return str(places.get(mac(lab, client), ""))

    becomes(lambda: [known(judge) for judge in judges], [ap] * len(judges))


class Echoing:
    """A TCP and UDP echo server in a thread, which notes where the UDP datagrams come from."""

    def __init__(self, listener: socket.socket, datagrams: socket.socket) -> None:
        self.listener, self.datagrams = listener, datagrams
        self.sources: dict[bytes, list[str]] = {}
        """Where each client socket's datagrams came from, the first one first."""
        self.ports = {listener.getsockname()[1], datagrams.getsockname()[1]}
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def _run(self) -> None:
        poll = select.epoll()
        connections: dict[int, socket.socket] = {}
        for each in (self.listener, self.datagrams):
            each.setblocking(False)
            poll.register(each, select.EPOLLIN)
        while not self._ends.is_set():
            for number, _ in poll.poll(0.05):
                self._serve(number, connections, poll)
        for connection in connections.values():
            connection.close()
        poll.close()

    def _serve(
        self, number: int, connections: dict[int, socket.socket], poll: select.epoll
    ) -> None:
        if number == self.listener.fileno():
            made, _ = self.listener.accept()
            connections[made.fileno()] = made
            poll.register(made, select.EPOLLIN)
        elif number == self.datagrams.fileno():
            data, source = self.datagrams.recvfrom(100)
            self.sources.setdefault(data.split()[0], []).append(source[0])
            self.datagrams.sendto(data, source)
        else:
            self._echo(connections[number], poll)

    @staticmethod
    def _echo(connection: socket.socket, poll: select.epoll) -> None:
        try:
            data = connection.recv(100)
        except ConnectionResetError:
            data = b""
        if data:
            connection.send(data)
        else:
            poll.unregister(connection)
            connection.close()


@contextlib.contextmanager
def echoing(lab: Lab) -> Iterator[Echoing]:
    """An echo server on the server, for TCP and UDP."""
    with (
        listening(lab, "server", SERVER) as listener,
        udp(lab, "server", SERVER, 0) as datagrams,
        Echoing(listener, datagrams) as server,
    ):
        yield server


@dataclass(slots=True)
class Early:
    """A TCP connection and a UDP socket, opened so short a time before a roam."""

    name: bytes
    connection: socket.socket
    datagrams: socket.socket

    def open(self, server: Echoing) -> None:
        """Open both; nothing is waited for."""
        self.connection.setblocking(False)
        assert self.connection.connect_ex(server.listener.getsockname()) != 0
        self.datagrams.setblocking(False)
        self.datagrams.connect(server.datagrams.getsockname())
        self.datagrams.send(self.name + b" early")

    def exchange(self) -> None:
        """A line to the server and back over both; the datagram is repeated until it is."""
        self.connection.settimeout(PATIENCE_S)
        self.connection.sendall(self.name)
        assert self.connection.recv(100) == self.name
        self.datagrams.settimeout(0.2)
        wanted = self.name + b" late"

        def echoed() -> bool:
            self.datagrams.send(wanted)
            with contextlib.suppress(TimeoutError):
                while self.datagrams.recv(100) != wanted:
                    pass
                return True
            return False

        eventually(echoed)


@contextlib.contextmanager
def early(lab: Lab, client: str, count: int) -> Iterator[list[Early]]:
    """`count` pairs of sockets of a client."""
    with contextlib.ExitStack() as stack, namespaces.inside(lab.namespace(client)):
        yield [
            Early(
                b"%d" % number,
                stack.enter_context(socket.socket()),
                stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)),
            )
            for number in range(count)
        ]


def settled(lab: Lab, client: str) -> dict[Flow, str]:
    """Wait until agents, conntrack tables and nftables maps say the same; every flow's anchor."""
    known = [session for session in agreed(lab) if session.client == address(lab, client)]
    anchors = {Flow(*session[:1], *session[2:5]): session.anchor for session in known}
    assert len(anchors) == len(known), "a flow has two anchors"
    for ap in lab.aps:
        own = {flow for flow, anchor in anchors.items() if anchor == ap}
        becomes(partial(translated, lab, ap, client), own)
    return anchors


def translated(lab: Lab, ap: str, client: str) -> set[Flow]:
    """The client's flows in the AP's conntrack table."""
    matches = map(_TRACKED.match, tracked(lab, ap, client))
    fields = [match.groups() for match in matches if match is not None]
    return {Flow(proto, int(port), remote, int(rport)) for proto, remote, port, rport in fields}
