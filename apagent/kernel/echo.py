"""ICMP echo (RFC 792) to many hosts at once, in rounds: whose kernel is alive.

A round is one packet, sent to every host; answers are told from others by our identifier and the
round's number, and a filter keeps all else from waking us. One socket does both: it sends by an
interface whose index is asked anew each round, since one that was made anew has another.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from collections.abc import Sequence
from ipaddress import IPv4Address

from apagent.errors import KernelFault
from apagent.kernel import packet_filter
from apagent.kernel.datagrams import BatchReceiver, BatchSender
from apagent.kernel.packet_filter import DROP, KEEP, equals, load_byte, load_half

LATE_ROUNDS = 10
"""An answer to one of so many latest rounds still counts."""

_IP_UNICAST_IF = 50
"""linux/in.h"""
_SIOCGIFINDEX = 0x8933
"""netdevice(7); linux/sockios.h. `socket.if_nametoindex` makes a socket of its own each time."""
_IFREQ = struct.Struct("=16si20x")
_ECHO_REPLY, _ECHO_REQUEST = 0, 8
_ECHO = struct.Struct(">BBHHH")
_ROUNDS = 1 << 16
_BARE_IPV4 = 0x45
"""Version 4 and a header of 20 bytes: what answers a request without options."""
_TYPE_AT, _IDENTIFIER_AT = 20, 24
_ANSWER = struct.Struct(">12x4s10xH")
"""Its source, and the sequence number of the echo."""
_ANSWER_SIZE = _ANSWER.size
_SLOTS = 128
"""Answers that are fetched at once."""
_BUFFER = 1 << 20


class Pinger:
    """Pings hosts by one interface, from `source` if that is given.

    Raises KernelFault where there can be no such socket.
    """

    def __init__(self, interface: str, source: IPv4Address | None = None) -> None:
        self._interface = interface
        self._index_request = _IFREQ.pack(interface.encode(), 0)
        self._index = 0
        self._identifier = int.from_bytes(os.urandom(2), "big")
        self._round = 0
        self._sender = BatchSender(_ECHO.size)
        self._receiver = BatchReceiver(_SLOTS, _ANSWER_SIZE)
        try:
            self._socket = socket.socket(
                socket.AF_INET,
                socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
                socket.IPPROTO_ICMP,
            )
        except OSError as error:
            raise self._fault(error) from None
        try:
            packet_filter.attach(self._socket, _answers_to(self._identifier))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
            if source is not None:
                self._socket.bind((str(source), 0))
        except OSError as error:
            self._socket.close()
            raise self._fault(error) from None

    def send(self, hosts: Sequence[bytes]) -> None:
        """Begin a round: one packet to each host (4 bytes). Who can't be sent to keeps no other.

        Raises KernelFault if nothing can be sent to anybody, since the interface is gone or down.
        """
        self._round = (self._round + 1) % _ROUNDS
        if not hosts:
            return
        _pack_request(self._sender.payload, self._identifier, self._round)
        try:
            self._choose_interface()
        except OSError as error:
            raise self._fault(error) from None
        sent, refusal = self._sender.send(self._socket, hosts)
        if refusal is not None and not sent:
            raise self._fault(refusal)

    def answered(self) -> dict[bytes, int]:
        """Who has answered a recent round since the last call; never blocks.

        Host -> how many rounds before the present one its latest answer belongs to.
        """
        found: dict[bytes, int] = {}
        receiver = self._receiver
        with contextlib.suppress(OSError):
            while lengths := receiver.receive(self._socket):
                answers = _ANSWER.iter_unpack(receiver.buffer)
                for _, (host, sequence) in zip(lengths, answers, strict=False):
                    late = (self._round - sequence) % _ROUNDS
                    if late < found.get(host, LATE_ROUNDS):
                        found[host] = late
                if len(lengths) < _SLOTS:
                    break
        return found

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _choose_interface(self) -> None:
        """Send by the interface that has the name now: one made anew has another index."""
        answer = fcntl.ioctl(self._socket, _SIOCGIFINDEX, self._index_request)
        _, index = _IFREQ.unpack(answer)
        if index != self._index:
            self._socket.setsockopt(socket.SOL_IP, _IP_UNICAST_IF, socket.htonl(index))
            self._index = index

    def _fault(self, error: OSError) -> KernelFault:
        text = f"probes by {self._interface}: {error.strerror}"
        return KernelFault(text, error.errno or 0)


def _pack_request(packet: bytearray, identifier: int, sequence: int) -> None:
    total = (_ECHO_REQUEST << 8) + identifier + sequence
    total = (total & 0xFFFF) + (total >> 16)
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    _ECHO.pack_into(packet, 0, _ECHO_REQUEST, 0, checksum, identifier, sequence)


def _answers_to(identifier: int) -> bytes:
    """A filter on IPv4 packets."""
    return packet_filter.assemble(
        (
            "answers",
            (
                load_byte(0),
                equals(_BARE_IPV4, "", DROP),
                load_byte(_TYPE_AT),
                equals(_ECHO_REPLY, "", DROP),
                load_half(_IDENTIFIER_AT),
                equals(identifier, KEEP, DROP),
            ),
        )
    )
