"""Sockets in the lab's nodes, for tests that speak themselves."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from apagent.lab import namespaces
from apagent.lab.lab import Lab
from tests.netns.observe import SERVER

TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Connection:
    """Both ends of a TCP connection, and the client's address as the server sees it."""

    client: socket.socket
    server: socket.socket
    source: str

    def exchange(self, line: bytes) -> None:
        """A line there and back."""
        self.client.sendall(line)
        assert _receive(self.server, len(line)) == line
        self.server.sendall(line)
        assert _receive(self.client, len(line)) == line


def _receive(end: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = end.recv(size - len(data))
        assert piece, "the other end closed the connection"
        data += piece
    return data


@contextlib.contextmanager
def connection(lab: Lab, client: str) -> Iterator[Connection]:
    """A new TCP connection from the client to the server."""
    with namespaces.inside(lab.namespace("server")):
        listener = socket.create_server((SERVER, 0))
    with namespaces.inside(lab.namespace(client)):
        near = socket.socket()
    with listener, near:
        listener.settimeout(TIMEOUT_S)
        near.settimeout(TIMEOUT_S)
        near.connect(listener.getsockname())
        far, (source, _) = listener.accept()
        with far:
            far.settimeout(TIMEOUT_S)
            yield Connection(near, far, source)


@contextlib.contextmanager
def udp_socket(lab: Lab, node: str, address: str = "") -> Iterator[socket.socket]:
    """A UDP socket in a node, bound if there is an address."""
    with namespaces.inside(lab.namespace(node)):
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with udp:
        udp.settimeout(TIMEOUT_S)
        if address:
            udp.bind((address, 0))
        yield udp


def ask_source(client: socket.socket, server: socket.socket) -> str:
    """The client's address as the server sees it in a datagram, which it answers."""
    client.sendto(b"who am I", server.getsockname())
    _, (source, port) = server.recvfrom(100)
    server.sendto(b"an answer", (source, port))
    assert client.recv(100) == b"an answer"
    return str(source)
