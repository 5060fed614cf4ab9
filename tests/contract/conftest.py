"""An access point to test on: a network namespace with a bridge, two ports and an uplink."""

from __future__ import annotations

import ctypes
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from apagent.core.model import Mac
from apagent.kernel.linux import LinuxDataPath
from tests.contract import packets
from tests.contract.packets import Packet, Wire, mac_bytes, udp
from tests.domains import domain

CLONE_NEWNET = 0x40000000
"""linux/sched.h"""
PORTS = ("port1", "port2")
GATEWAY_MAC = Mac("02:00:00:00:00:01")

_SETUP = f"""
link set lo up
link add br-lan address {GATEWAY_MAC} type bridge
link add port1 type veth peer name client1
link add port2 type veth peer name client2
link set port1 master br-lan
link set port2 master br-lan
link set port1 up
link set port2 up
link set client1 up arp off
link set client2 up arp off
link set br-lan up
address add 10.77.0.1/16 dev br-lan
link add br-zoo type bridge
link add wan type veth peer name internet
link set internet up
link set wan up
address add 203.0.113.11/24 dev wan
link add underlay type veth peer name others
link set others up
link set underlay up
address add 10.99.0.1/24 dev underlay
"""


def run(*argv: str, stdin: str | None = None) -> str:
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{argv}: {done.stderr}"
    return done.stdout


def without_time(listed: str) -> str:
    """A ruleset without the elements that end by themselves.

    A set without elements has no line for them.
    """
    return re.sub(r"\t\telements = {[^}]* expires [^}]*}\n", "", listed)


class AccessPoint:
    """The current namespace, as the tests see and change it."""

    def snapshot(self) -> dict[str, str]:
        """All that the kernel says, except what lives by timers."""
        return {
            "links": run("ip", "link"),
            "tunnels": run("ip", "-d", "link", "show", "type", "vxlan"),
            "addresses": run("ip", "-4", "address"),
            "rules": run("ip", "rule"),
            "routes": run("ip", "-4", "route", "show", "table", "all"),
            "neighbours": run("ip", "-4", "neighbour"),
            "fdb": run("bridge", "fdb"),
            "ruleset": without_time(run("nft", "-a", "list", "ruleset")),
        }

    def send_arp(self, mac: Mac, address: IPv4Address, port: int = 0) -> None:
        """A client asks for the gateway (RFC 826)."""
        body = b"\x00\x01\x08\x00\x06\x04\x00\x01" + mac_bytes(mac) + address.packed
        self._send(port, b"\xff" * 6, mac, b"\x08\x06" + body + bytes(6) + bytes([10, 77, 0, 1]))

    def send_hello(self, mac: Mac, port: int = 0) -> None:
        """A frame that no protocol of ours understands: the bridge learns from it, nobody else."""
        self._send(port, b"\xff" * 6, mac, b"\x88\xb5" + bytes(46))

    def send_udp(self, mac: Mac, address: IPv4Address, port: int = 0) -> None:
        """A datagram to the Internet by way of the gateway."""
        self.send(mac, udp(address, 0x1000), port)

    def send(self, mac: Mac, packet: Packet, port: int = 0) -> None:
        """A packet by way of the gateway."""
        self._send(port, mac_bytes(GATEWAY_MAC), mac, b"\x08\x00" + packet.packed)

    def forward_to_the_internet(self) -> None:
        """Routes all to the uplink, so that nothing waits for ARP."""
        run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        run("ip", "route", "add", "default", "via", "203.0.113.1", "dev", "wan")
        run("ip", "neigh", "add", "203.0.113.1", "lladdr", "02:00:00:00:00:99", "dev", "wan")

    def _send(self, port: int, to: bytes, mac: Mac, rest: bytes) -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
            wire.bind((f"client{port + 1}", 0))
            wire.send(to + mac_bytes(mac) + rest)


def _enter(call: str, argument: int, *more: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, call)(argument, *more) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{call}: {os.strerror(code)}")


@pytest.fixture
def access_point() -> Iterator[AccessPoint]:
    """A fresh network namespace for this thread, which is gone when the test is over."""
    with Path("/proc/thread-self/ns/net").open() as home:
        _enter("unshare", CLONE_NEWNET)
        try:
            # IPv6 would speak by itself, and the bridge would learn from it.
            run("sysctl", "-q", "net.ipv6.conf.default.disable_ipv6=1")
            run("ip", "-batch", "-", stdin=_SETUP)
            yield AccessPoint()
        finally:
            _enter("setns", home.fileno(), CLONE_NEWNET)


# An AP that forwards


@pytest.fixture
def path(access_point: AccessPoint) -> Iterator[LinuxDataPath]:
    """A prepared data path whose AP forwards, and holds nothing back any more."""
    access_point.forward_to_the_internet()
    path = LinuxDataPath()
    path.prepare(domain())
    path.release_hold()
    yield path
    path.close()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def internet(access_point: AccessPoint, stack: ExitStack) -> Wire:
    """What leaves by the uplink."""
    return stack.enter_context(packets.wire("internet"))


@pytest.fixture
def client(access_point: AccessPoint, stack: ExitStack) -> Wire:
    """What clients at the first port receive."""
    return stack.enter_context(packets.wire("client1"))


@pytest.fixture
def tunnel(path: LinuxDataPath, stack: ExitStack) -> Wire:
    """What leaves by the tunnel."""
    return stack.enter_context(packets.wire("apv-lan", outgoing=True))
