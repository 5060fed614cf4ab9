"""A client, a router that translates, and a server: each a network namespace."""

from __future__ import annotations

import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, TypeVar

from apagent.core.model import ICMP, TCP, UDP, Flow, FlowKey, Nat, Translation
from tests.contract.conftest import CLONE_NEWNET, _enter, run

T = TypeVar("T")

CLIENT, OTHER_CLIENT = IPv4Address("10.77.1.1"), IPv4Address("10.77.1.2")
OUTSIDE = IPv4Address("203.0.113.11")
SERVER = IPv4Address("203.0.113.1")
FORWARDED = IPv4Address("203.0.113.200")
"""The router sends what is for this address to the server."""
FORWARDED_PORT = 5300
CALLED_PORT, CLIENT_PORT = 9000, 9001
"""The router sends what the server sends to the one of them to the other, of the client."""

_ROUTER = f"""
link set lo up
link add br-lan type veth peer name eth0 netns {{client}}
link add wan type veth peer name eth0 netns {{server}}
link set br-lan up
link set wan up
address add 10.77.0.1/16 dev br-lan
address add {OUTSIDE}/24 dev wan
"""
_CLIENT = f"""
link set eth0 up
address add {CLIENT}/16 dev eth0
address add {OTHER_CLIENT}/16 dev eth0
address add 10.78.0.1/16 dev eth0
route add default via 10.77.0.1
"""
_SERVER = f"""
link set eth0 up
address add {SERVER}/24 dev eth0
route add 10.78.0.0/16 via {OUTSIDE}
"""
_RULESET = f"""
table ip nat {{
    chain in {{
        type nat hook prerouting priority dstnat;
        ip daddr {FORWARDED} udp dport 53 dnat to {SERVER}:{FORWARDED_PORT}
        iifname "wan" udp dport {CALLED_PORT} dnat to {CLIENT}:{CLIENT_PORT}
    }}
    chain out {{
        type nat hook postrouting priority srcnat;
        oifname "wan" ip saddr 10.77.0.0/16 masquerade
    }}
}}
"""


def namespace(stack: ExitStack) -> int:
    """A new namespace, held by a process; its id."""
    argv = ["unshare", "--net", "sh", "-c", "echo; exec sleep 600"]
    holder = stack.enter_context(subprocess.Popen(argv, stdout=subprocess.PIPE))
    stack.callback(holder.kill)
    assert holder.stdout is not None
    holder.stdout.readline()
    return holder.pid


def inside(pid: int, make: Callable[[], T]) -> T:
    """Call `make` in the process's namespace; a socket that it makes stays there."""
    results: list[T] = []

    def enter() -> None:
        with Path(f"/proc/{pid}/ns/net").open() as namespace:
            _enter("setns", namespace.fileno(), CLONE_NEWNET)
        results.append(make())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    return results[0]


def run_inside(pid: int, *argv: str, stdin: str | None = None) -> str:
    return run("nsenter", f"--net=/proc/{pid}/ns/net", *argv, stdin=stdin)


def _conntrack(command: str, flow: FlowKey) -> tuple[str, ...]:
    """A call of the conntrack tool for the flow's entry."""
    entry = Flow.of(flow)
    ports: tuple[str, ...] = ("--icmp-id", str(entry.client_port))
    if entry.protocol != ICMP:
        ports = ("--orig-port-src", str(entry.client_port))
    name = {ICMP: "icmp", TCP: "tcp", UDP: "udp"}[entry.protocol]
    addresses = ("-s", str(entry.client), "-d", str(entry.remote))
    return ("conntrack", command, "-p", name, *addresses, *ports)


class Router:
    """The current namespace, with traffic of a client through it."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._client, self._server = namespace(stack), namespace(stack)
        self._connections: dict[FlowKey, socket.socket] = {}
        self._senders: dict[FlowKey, tuple[socket.socket, socket.socket, Any]] = {}
        setup = _ROUTER.format(client=self._client, server=self._server)
        run("ip", "-batch", "-", stdin=setup)
        run_inside(self._client, "ip", "-batch", "-", stdin=_CLIENT)
        run_inside(self._server, "ip", "-batch", "-", stdin=_SERVER)
        run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        run("nft", "-f", "-", stdin=_RULESET)
        self._receivers = {
            SERVER: self._listen(socket.SOCK_DGRAM, 53),
            FORWARDED: self._listen(socket.SOCK_DGRAM, FORWARDED_PORT),
        }
        self._listen(socket.SOCK_STREAM, 80).listen()

    def open(
        self, protocol: int, port: int, client: IPv4Address = CLIENT, server: IPv4Address = SERVER
    ) -> FlowKey:
        """Let the client send the first packet of a flow, and the server get it."""
        if protocol == ICMP:
            argv = ("ping", "-c1", "-W5", f"-e{port}", f"-I{client}", str(server))
            run_inside(self._client, *argv)
            return Flow(ICMP, client, port, server, 0).key
        if protocol == TCP:
            connection = self._socket(self._client, socket.SOCK_STREAM, client, port)
            connection.connect((str(server), 80))
            flow = Flow(TCP, client, port, server, 80).key
            self._connections[flow] = connection
            return flow
        sender = self._socket(self._client, socket.SOCK_DGRAM, client, port)
        sender.sendto(b"hello", (str(server), 53))
        flow = Flow(UDP, client, port, server, 53).key
        if server in self._receivers:
            _, seen = self._receivers[server].recvfrom(100)
            self._senders[flow] = sender, self._receivers[server], seen
        return flow

    def answer(self, flow: FlowKey) -> None:
        """Let the server send a datagram of a flow, and the client one more."""
        client, server, seen = self._senders[flow]
        server.sendto(b"hello", seen)
        client.recv(100)
        client.sendto(b"hello", server.getsockname())
        server.recv(100)

    def hang_up(self, flow: FlowKey) -> None:
        """Let the client close its end of a connection."""
        self._connections[flow].shutdown(socket.SHUT_WR)

    def call(self, port: int, *, answer: bool = False) -> FlowKey:
        """Let the server send the first packet of a flow, by the forwarded port."""
        client = self._socket(self._client, socket.SOCK_DGRAM, CLIENT, CLIENT_PORT)
        server = self._socket(self._server, socket.SOCK_DGRAM, SERVER, port)
        server.sendto(b"hello", (str(OUTSIDE), CALLED_PORT))
        _, seen = client.recvfrom(100)
        if answer:
            client.sendto(b"hello", seen)
            server.recv(100)
        return Flow(UDP, CLIENT, CLIENT_PORT, SERVER, port).key

    def close(self, flow: FlowKey) -> None:
        """End the flow's conntrack entry."""
        run(*_conntrack("-D", flow))

    def expire(self, flow: FlowKey) -> None:
        """Let the time of the flow's conntrack entry be over."""
        run(*_conntrack("-U", flow), "--timeout", "1")
        time.sleep(1.1)  # there is no shorter one

    def translation(self, flow: FlowKey) -> Nat:
        """What the conntrack tool says that the flow is translated to."""
        entry = Flow.of(flow)
        field = "id" if entry.protocol == ICMP else "dport"
        listed = run("conntrack", "-L", "-s", str(entry.client), "-d", str(entry.remote))
        ours = next(
            line
            for line in listed.splitlines()
            if f" sport={entry.client_port} " in line or f" id={entry.client_port} " in line
        )
        reply = ours[ours.rindex("src=") :]
        address, port = re.search(rf"dst=(\S+) .*{field}=(\d+)", reply).groups()  # type: ignore[union-attr]
        return Translation(IPv4Address(address), int(port)).packed

    def _listen(self, kind: int, port: int) -> socket.socket:
        return self._socket(self._server, kind, SERVER, port)

    def _socket(self, pid: int, kind: int, address: IPv4Address, port: int) -> socket.socket:
        made = self._stack.enter_context(inside(pid, lambda: socket.socket(socket.AF_INET, kind)))
        made.settimeout(5)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((str(address), port))
        return made


@contextmanager
def routed() -> Iterator[Router]:
    """A router for this thread, which is gone with all its traffic afterwards."""
    with ExitStack() as stack:
        home = stack.enter_context(Path("/proc/thread-self/ns/net").open())
        _enter("unshare", CLONE_NEWNET)
        stack.callback(_enter, "setns", home.fileno(), CLONE_NEWNET)
        yield Router(stack)
