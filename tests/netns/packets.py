"""Packets by hand: UDP flows whose two ends a test holds, and the ICMP errors that come of them."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from apagent.lab import namespaces
from apagent.lab.lab import Lab
from apagent.lab.plan import GATEWAY as GATEWAY_ADDRESS
from apagent.lab.plan import UPLINKS
from tests.netns.observe import NOTICE_S, SERVER, becomes, served_by, sessions
from tests.netns.sockets import Connection, connection, udp_socket

GATEWAY = str(GATEWAY_ADDRESS)
ROUTER = str(UPLINKS[1])
"""The APs' next hop, as their uplinks see it."""
HEADERS = 28
"""Bytes of IPv4 and UDP header."""

IP_MTU_DISCOVER, IP_PMTUDISC_DONT, IP_PMTUDISC_DO = 10, 0, 2
IP_RECVERR, IP_MTU = 11, 14
"""linux/in.h; the socket module doesn't name them."""
_EXTENDED_ERROR = struct.Struct("=IBBBBII")
"""struct sock_extended_err (linux/errqueue.h); the offender's struct sockaddr_in is behind it."""
UNREACHABLE, TIME_EXCEEDED = 3, 11
PORT_UNREACHABLE, FRAGMENTATION_NEEDED = 3, 4
"""ICMP types and codes (RFC 792)."""


def roam(lab: Lab, client: str, ap: str) -> int:
    """Let the client roam and wait until every AP knows; when its link was up (monotonic, ns)."""
    linked = lab.roam(client, ap)
    served_by(lab, client, ap)
    return linked


def port_of(end: socket.socket) -> int:
    """The socket's own port."""
    return int(end.getsockname()[1])


def anchors(lab: Lab, ap: str, client_port: int) -> list[str]:
    """The anchors of the sessions with this client port, as the AP knows them."""
    return [flow.anchor for flow in sessions(lab, ap) if flow.client_port == client_port]


def anchored(lab: Lab, client_port: int, ap: str) -> None:
    """Wait until every AP knows that the flow is anchored at `ap`."""
    becomes(lambda: [anchors(lab, each, client_port) for each in lab.aps], [[ap]] * len(lab.aps))


@dataclass(frozen=True, slots=True)
class Ends:
    """Both ends of a UDP flow, each connected to the other, with IP_RECVERR on."""

    client: socket.socket
    server: socket.socket

    @property
    def inside(self) -> Endpoints:
        """The flow as the client knows it."""
        return (*self.client.getsockname(), *self.client.getpeername())

    @property
    def outside(self) -> Endpoints:
        """What the server sends, as the server knows it."""
        return (*self.server.getsockname(), *self.server.getpeername())

    def exchange(self, size: int = 10) -> None:
        """A datagram of `size` bytes of payload there and back, whole."""
        for sender, receiver in ((self.client, self.server), (self.server, self.client)):
            sender.send(bytes(range(256)) * (size // 256) + bytes(size % 256))
            assert len(receiver.recv(1 << 16)) == size

    def discover_mtu(self, mode: int) -> None:
        """Set IP_MTU_DISCOVER of both ends."""
        for end in (self.client, self.server):
            end.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, mode)


Endpoints = tuple[str, int, str, int]


@contextlib.contextmanager
def udp_flow(lab: Lab, client: str = "client1") -> Iterator[Ends]:
    """A UDP flow from the client to the server that has been translated where the client is.

    Every AP knows it when the block begins.
    """
    with udp_socket(lab, client) as near, udp_socket(lab, "server", SERVER) as far:
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
        near.connect(far.getsockname())
        near.send(b"hello")
        _, source = far.recvfrom(100)
        far.connect(source)
        ends = Ends(near, far)
        ends.exchange()
        anchored(lab, port_of(near), lab.location(client))
        yield ends


@contextlib.contextmanager
def tcp_connection(lab: Lab, client: str) -> Iterator[Connection]:
    """A new TCP connection from the client to the server that every AP knows."""
    with connection(lab, client) as opened:
        anchored(lab, port_of(opened.client), lab.location(client))
        yield opened


class Error(NamedTuple):
    """An ICMP error that a socket was told of: whose, what, and its MTU field."""

    offender: str
    type: int
    code: int
    mtu: int


def error_of(end: socket.socket) -> Error:
    """The next ICMP error in the socket's queue: its embedded header named this socket."""
    waiting = select.poll()
    waiting.register(end, select.POLLERR)
    assert waiting.poll(NOTICE_S * 1000), "no ICMP error reached the socket"
    _, messages, _, _ = end.recvmsg(1 << 16, 1 << 10, socket.MSG_ERRQUEUE)
    end.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    data = next(m[2] for m in messages if m[:2] == (socket.IPPROTO_IP, IP_RECVERR))
    _, _, type_, code, _, info, _ = _EXTENDED_ERROR.unpack_from(data)
    offender = socket.inet_ntoa(data[_EXTENDED_ERROR.size + 4 :][:4])
    return Error(offender, type_, code, info)


class Quotation(NamedTuple):
    """An ICMP error as it is on the wire, and the packet that it quotes."""

    source: str
    type: int
    code: int
    mtu: int
    quoted: Endpoints
    header_is_sound: bool
    """Whether the quoted IPv4 header's checksum is right."""


@contextlib.contextmanager
def icmp_errors(lab: Lab, node: str) -> Iterator[Callable[[], list[Quotation]]]:
    """The ICMP errors that come to a node while the block runs."""
    with namespaces.inside(lab.namespace(node)):
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    with raw:
        raw.setblocking(False)
        found: list[Quotation] = []

        def errors() -> list[Quotation]:
            with contextlib.suppress(BlockingIOError):
                while True:
                    packet = raw.recv(1 << 12)
                    if packet[20] in (UNREACHABLE, TIME_EXCEEDED):
                        found.append(_quotation(packet))
            return found

        yield errors


def _quotation(packet: bytes) -> Quotation:
    type_, code, mtu = struct.unpack_from(">BBxxxxH", packet, 20)
    inner = packet[28:]
    source, destination = socket.inet_ntoa(inner[12:16]), socket.inet_ntoa(inner[16:20])
    port, to_port = struct.unpack_from(">HH", inner, 20)
    total = sum(struct.unpack(">10H", inner[:20]))
    sound = (total & 0xFFFF) + (total >> 16) == 0xFFFF
    quoted = (source, port, destination, to_port)
    return Quotation(socket.inet_ntoa(packet[12:16]), type_, code, mtu, quoted, sound)


@contextlib.contextmanager
def link_mtu(lab: Lab, node: str, interface: str, mtu: int) -> Iterator[None]:
    """Lower a link's MTU at one end; nobody remembers a path MTU when the block ends."""
    set_mtu(lab, node, interface, mtu)
    try:
        yield
    finally:
        set_mtu(lab, node, interface, 1500)
        forget_path_mtus(lab)


def set_mtu(lab: Lab, node: str, interface: str, mtu: int) -> None:
    """Set an interface's MTU."""
    lab.run(node, ["ip", "link", "set", interface, "mtu", str(mtu)])


def forget_path_mtus(lab: Lab) -> None:
    """Make clients and server forget what ICMP errors have taught them."""
    for node in ("server", *lab.clients):
        lab.run(node, ["ip", "route", "flush", "cache"])
