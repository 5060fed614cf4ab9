"""Rousing clients of a dead anchor: what is left to a client that only listens.

A client that downloads sends nothing while nothing comes, and would wait for a dead anchor for many
minutes. So it is sent segments as if by its server, with a sequence number that can't be right. It
answers with an acknowledgement that has the right ones (RFC 9293, section 3.10.7.4, first check).
That packet matches no flow here any more, and is reset.

There are two segments, since one may fail to be wrong enough, or be wrong in too many ways. Of two
sequence numbers half of the number space apart one is outside of every window. A connection that
uses timestamps ignores a segment without one, and some ignore one with an old timestamp (RFC 7323,
sections 3.2 and 5.3), which of two that are as far apart only one is.

The frames go out on the client interface as they are: no conntrack, no route, no translation.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable, Mapping

from apagent.core.model import FlowKey, Mac
from apagent.errors import KernelFault

_ETH_P_IP = b"\x08\x00"
_IP = struct.Struct(">BBHHHBBH4s4s")
_TCP = struct.Struct(">HHIIBBHHH")
_PSEUDO = struct.Struct(">4s4sBBH")
_TTL, _PROTOCOL_TCP = 64, 6
_VERSION_AND_LENGTH, _DATA_OFFSET = 0x45, 0x80
_DONT_FRAGMENT = 0x4000
_ACK = 0x10
_TIMESTAMP = struct.Struct(">BBBBII")
_NOP, _TIMESTAMP_KIND, _TIMESTAMP_SIZE = 1, 8, 10
"""RFC 7323, section 3.2 and appendix A."""
_HALF = 1 << 31


class ClientPoker:
    """Sends to clients on one client interface. Raises KernelFault where that can't be done."""

    def __init__(self, interface: str) -> None:
        self._interface = interface
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC)

    def poke(self, clients: Mapping[Mac, Iterable[FlowKey]]) -> None:
        """Send every client the segments of each of its TCP flows."""
        try:
            self._socket.bind((self._interface, 0))
            us = bytes(self._socket.getsockname()[4])
            for mac, flows in clients.items():
                head = bytes.fromhex(mac.replace(":", "")) + us + _ETH_P_IP
                for flow in flows:
                    for segment in segments(flow):
                        self._send(head + segment)
        except OSError as error:
            text = f"sending to clients on {self._interface}: {error.strerror}"
            raise KernelFault(text, error.errno or 0) from None

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _send(self, frame: bytes) -> None:
        try:
            self._socket.send(frame)
        except OSError as error:
            # A full queue drops the frame: its client may still send something by itself.
            if error.errno != errno.ENOBUFS:
                raise


def segments(flow: FlowKey) -> list[bytes]:
    """Bare acknowledgements of the server in IPv4 packets; no two are in one half of anything."""
    return [_segment(flow, number) for number in (0, _HALF)]


def _segment(flow: FlowKey, number: int) -> bytes:
    """With `number` as sequence number, as what it acknowledges, and as timestamp."""
    client, server = flow[:4], flow[4:8]
    ports = int.from_bytes(flow[11:13], "big"), int.from_bytes(flow[9:11], "big")
    options = _TIMESTAMP.pack(_NOP, _NOP, _TIMESTAMP_KIND, _TIMESTAMP_SIZE, number, 0)

    def tcp(checksum: int) -> bytes:
        head = _TCP.pack(*ports, number, number, _DATA_OFFSET, _ACK, 0, checksum, 0)
        return head + options

    def ip(checksum: int) -> bytes:
        length = _IP.size + _TCP.size + _TIMESTAMP.size
        return _IP.pack(
            _VERSION_AND_LENGTH, 0, length, 0, _DONT_FRAGMENT, _TTL, _PROTOCOL_TCP, checksum,
            server, client,
        )  # fmt: skip

    pseudo = _PSEUDO.pack(server, client, 0, _PROTOCOL_TCP, _TCP.size + _TIMESTAMP.size)
    return ip(_checksum(ip(0))) + tcp(_checksum(pseudo + tcp(0)))


def _checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of an even number of bytes."""
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
