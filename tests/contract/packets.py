"""Packets byte by byte, and the wires that tests send them on and catch them from."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address
from typing import NamedTuple

from apagent.core.model import ICMP, TCP, UDP, Mac

BROADCAST = Mac("ff:ff:ff:ff:ff:ff")
REMOTE = IPv4Address("198.51.100.10")
"""Somebody on the Internet."""
SYN, RST, ACK = 0x02, 0x04, 0x10
TCP_SEQUENCE = 1000
PORT_UNREACHABLE, FRAGMENTATION_NEEDED, REASSEMBLY_TIME_EXCEEDED = (3, 3), (3, 4), (11, 1)
"""ICMP errors that a client sends: type and code (RFC 792)."""

_ETH_P_ALL, _ETH_P_IP, _ETH_P_ARP = 0x0003, 0x0800, 0x0806
_ETHERNET_SIZE, _IPV4_SIZE = 14, 20
_MULTICAST = 0x01
"""In the first byte of a MAC (IEEE 802)."""
_IPV4 = struct.Struct(">BBHHHBBH4s4s")
_UDP = struct.Struct(">HHHH")
_TCP = struct.Struct(">HHIIBBHHH")
_ARP = struct.Struct(">HHBBH6s4s6s4s")
_PATIENCE_S = 5.0
"""A busy machine delays packets."""


def mac_bytes(mac: Mac) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def checksum(data: bytes) -> int:
    """RFC 1071; of data that holds its own right checksum it is 0."""
    padded = data + bytes(len(data) % 2)
    total: int = sum(struct.unpack(f">{len(padded) // 2}H", padded))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


class Packet(NamedTuple):
    """An IPv4 packet without options (RFC 791)."""

    source: IPv4Address
    destination: IPv4Address
    protocol: int
    body: bytes
    ttl: int = 64

    @property
    def packed(self) -> bytes:
        source, destination = self.source.packed, self.destination.packed
        size = _IPV4_SIZE + len(self.body)
        head = (0x45, 0, size, 0, 0, self.ttl, self.protocol)
        total = checksum(_IPV4.pack(*head, 0, source, destination))
        return _IPV4.pack(*head, total, source, destination) + self.body

    @classmethod
    def of(cls, data: bytes) -> Packet:
        """Unpack a packet whose header has the right checksum."""
        assert checksum(data[:_IPV4_SIZE]) == 0
        _, _, size, _, _, ttl, protocol, _, source, destination = _IPV4.unpack_from(data)
        body = data[_IPV4_SIZE:size]
        return cls(IPv4Address(source), IPv4Address(destination), protocol, body, ttl)

    @property
    def source_port(self) -> int:
        return int.from_bytes(self.body[:2], "big")

    @property
    def tcp_flags(self) -> int:
        assert self.protocol == TCP
        return self.body[13]


def _with_checksum(
    source: IPv4Address, destination: IPv4Address, protocol: int, body: bytes
) -> int:
    """Of a TCP or UDP body, with the pseudo header (RFC 9293, section 3.1)."""
    pseudo = source.packed + destination.packed + struct.pack(">HH", protocol, len(body))
    return checksum(pseudo + body)


def udp(
    source: IPv4Address, port: int, to: IPv4Address = REMOTE, to_port: int = 53, ttl: int = 64
) -> Packet:
    """An empty datagram."""
    head = (port, to_port, _UDP.size)
    total = _with_checksum(source, to, UDP, _UDP.pack(*head, 0))
    return Packet(source, to, UDP, _UDP.pack(*head, total), ttl)


def tcp(
    source: IPv4Address,
    port: int,
    flags: int,
    to: IPv4Address = REMOTE,
    to_port: int = 80,
    options: bytes = b"",
    acknowledged: int = 2000,
) -> Packet:
    """A segment without data: with ACK alone it is one in mid-connection."""
    size = _TCP.size + len(options) << 2
    ack = acknowledged if flags & ACK else 0
    head = (port, to_port, TCP_SEQUENCE, ack, size, flags, 1024)
    total = _with_checksum(source, to, TCP, _TCP.pack(*head, 0, 0) + options)
    return Packet(source, to, TCP, _TCP.pack(*head, total, 0) + options)


def echo_request(source: IPv4Address, identifier: int, to: IPv4Address = REMOTE) -> Packet:
    """A ping."""
    body = struct.pack(">BBHHH", 8, 0, 0, identifier, 1)
    return Packet(source, to, ICMP, body[:2] + checksum(body).to_bytes(2, "big") + body[4:])


def icmp_error(kind: tuple[int, int], about: Packet) -> Packet:
    """What the receiver of `about` answers: its header and 8 bytes more (RFC 792)."""
    body = bytes([*kind]) + bytes(6) + about.packed[: _IPV4_SIZE + 8]
    body = body[:2] + checksum(body).to_bytes(2, "big") + body[4:]
    return Packet(about.destination, about.source, ICMP, body)


def frame(source: Mac, to: Mac, packet: Packet) -> bytes:
    return mac_bytes(to) + mac_bytes(source) + _ETH_P_IP.to_bytes(2, "big") + packet.packed


def vxlan(vni: int, source: IPv4Address, to: IPv4Address, inner: bytes) -> Packet:
    """A frame in the tunnel, without UDP checksum (RFC 7348)."""
    data = struct.pack(">II", 0x08000000, vni << 8) + inner
    return Packet(source, to, UDP, _UDP.pack(4789, 4789, _UDP.size + len(data), 0) + data)


class Arp(NamedTuple):
    """An ARP packet and whom the frame is for (RFC 826)."""

    to: Mac
    operation: int
    sender: Mac
    sender_address: IPv4Address
    target: Mac
    target_address: IPv4Address

    @classmethod
    def of(cls, data: bytes) -> Arp:
        """Unpack a frame."""
        _, _, _, _, operation, sender, sender_address, target, target_address = _ARP.unpack_from(
            data, _ETHERNET_SIZE
        )
        assert data[6:12] == sender
        return cls(
            Mac(data[:6].hex(":")),
            operation,
            Mac(sender.hex(":")),
            IPv4Address(sender_address),
            Mac(target.hex(":")),
            IPv4Address(target_address),
        )


class Wire:
    """One end of a wire: sends frames, and catches those that come, or that leave (`outgoing`)."""

    def __init__(self, device: str, *, outgoing: bool = False) -> None:
        self._outgoing = outgoing
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
        self._socket.bind((device, _ETH_P_ALL))

    def close(self) -> None:
        self._socket.close()

    def send(self, data: bytes) -> None:
        self._socket.send(data)

    def packets_until(self, last: Callable[[Packet], bool]) -> list[Packet]:
        """All IPv4 packets up to the first one for which `last` holds."""
        found: list[Packet] = []
        for data in self._ipv4_frames():
            found.append(Packet.of(data[_ETHERNET_SIZE:]))
            if last(found[-1]):
                return found
        raise AssertionError(f"the packet waited for did not come, but {found}")

    def frame(self) -> bytes:
        """The next IPv4 frame."""
        return next(self._ipv4_frames())

    def arps_until(self, last: Callable[[Arp], bool]) -> list[Arp]:
        """All ARP packets up to the first one for which `last` holds."""
        found: list[Arp] = []
        for data in self._frames(_ETH_P_ARP):
            found.append(Arp.of(data))
            if last(found[-1]):
                return found
        raise AssertionError(f"the ARP packet waited for did not come, but {found}")

    def _ipv4_frames(self) -> Iterator[bytes]:
        """Unicast only: the kernel itself says where it is in IGMP (RFC 3376)."""
        return (data for data in self._frames(_ETH_P_IP) if not data[0] & _MULTICAST)

    def _frames(self, ethertype: int) -> Iterator[bytes]:
        deadline = time.monotonic() + _PATIENCE_S
        while (left := deadline - time.monotonic()) > 0:
            self._socket.settimeout(left)
            try:
                data, (_, protocol, kind, *_) = self._socket.recvfrom(2048)
            except TimeoutError:
                return
            if protocol == ethertype and (kind == socket.PACKET_OUTGOING) == self._outgoing:
                yield data


@contextmanager
def wire(device: str, *, outgoing: bool = False) -> Iterator[Wire]:
    """A wire for as long as the test takes."""
    opened = Wire(device, outgoing=outgoing)
    try:
        yield opened
    finally:
        opened.close()


def mac_of(device: str) -> Mac:
    """An interface's MAC in the current namespace."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as probe:
        probe.bind((device, 0))
        address: bytes = probe.getsockname()[4]
        return Mac(address.hex(":"))


def eventually(holds: Callable[[], bool], patience_s: float = _PATIENCE_S) -> bool:
    """Whether it holds within some seconds."""
    deadline = time.monotonic() + patience_s
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()
