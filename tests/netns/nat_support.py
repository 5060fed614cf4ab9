"""What the tests of NAT behaviour share: questions to agents and kernels, and sockets in nodes."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator
from ipaddress import IPv4Address

from apagent.lab import namespaces
from apagent.lab.lab import Lab
from apagent.lab.plan import SECOND_SERVER_ADDRESS
from tests.netns.observe import Session, becomes, eventually, served_by, sessions

SECOND_SERVER = str(SECOND_SERVER_ADDRESS)
ANY = str(IPv4Address(0))
PATIENCE_S = 5.0
Address = tuple[str, int]


def flows(lab: Lab, ap: str, *filters: str) -> set[Session]:
    """The sessions that the AP's agent knows: protocol, client and remote with ports, anchor.

    Not the standing ones of port forwards.
    """
    found = sessions(lab, ap, *filters)
    return {session for session in found if session.remote != ANY}


def known_everywhere(lab: Lab, *filters: str, at_least: int = 1) -> None:
    """Wait until every AP knows the same sessions, `at_least` so many of them."""

    def agreed() -> bool:
        first, *others = (flows(lab, ap, *filters) for ap in lab.aps)
        return len(first) >= at_least and all(other == first for other in others)

    eventually(agreed)


def roam(lab: Lab, client: str, ap: str) -> None:
    """Let the client roam, and wait until every AP knows."""
    lab.roam(client, ap)
    served_by(lab, client, ap)


def forget_flows(lab: Lab) -> None:
    """End all flows on every AP, and wait until every AP knows it."""
    for ap in lab.aps:
        lab.run(ap, ["conntrack", "-F"])
    becomes(lambda: [flows(lab, ap) for ap in lab.aps], [set()] * len(lab.aps))


def set_timeouts(lab: Lab, seconds: int, *names: str) -> None:
    """Set conntrack timeouts of all APs, such as `udp_timeout`."""
    for ap in lab.aps:
        with namespaces.inside(lab.namespace(ap)):
            for name in names:
                namespaces.set_sysctl(f"netfilter/nf_conntrack_{name}", seconds)


@contextlib.contextmanager
def udp(lab: Lab, node: str, *bind: object) -> Iterator[socket.socket]:
    """A UDP socket in a node, bound if there is an address (text and port)."""
    with namespaces.inside(lab.namespace(node)):
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with made:
        made.settimeout(PATIENCE_S)
        if bind:
            made.bind(bind)
        yield made


@contextlib.contextmanager
def tcp(lab: Lab, node: str, to: Address, source: Address = ("", 0)) -> Iterator[socket.socket]:
    """A TCP connection from a node, from an address and port of its own if `source` says so."""
    with namespaces.inside(lab.namespace(node)):
        made = socket.socket()
    with made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.settimeout(PATIENCE_S)
        made.bind(source)
        made.connect(to)
        yield made


@contextlib.contextmanager
def listening(lab: Lab, node: str, at: str, port: int = 0) -> Iterator[socket.socket]:
    """A TCP listener in a node."""
    with namespaces.inside(lab.namespace(node)):
        made = socket.create_server((at, port))
    with made:
        made.settimeout(PATIENCE_S)
        yield made


def accepted(listener: socket.socket) -> tuple[socket.socket, Address]:
    """The next connection, and whom it comes from."""
    made, peer = listener.accept()
    made.settimeout(PATIENCE_S)
    return made, peer


def exchange(one: socket.socket, other: socket.socket) -> None:
    """A line there and back over a TCP connection."""
    for sender, receiver, line in ((one, other, b"question\n"), (other, one, b"answer\n")):
        sender.sendall(line)
        received = b""
        while len(received) < len(line):
            piece = receiver.recv(len(line) - len(received))
            assert piece, "the other end closed the connection"
            received += piece
        assert received == line


def ping(lab: Lab, node: str, to: str, *, count: int = 1, wait_s: float = 2.0) -> tuple[int, float]:
    """How many echo replies came, and the longest round trip in seconds."""
    argv = ["ping", "-n", f"-c{count}", "-i0.05", f"-W{wait_s}", to]
    output = lab.run(node, argv, check=False).stdout
    times = [float(found) / 1e3 for found in re.findall(r"time=([\d.]+) ms", output)]
    return len(times), max(times, default=0.0)
