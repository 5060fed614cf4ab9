"""ICMP echo (RFC 792) to many hosts at once, in rounds: whose kernel is alive.

A round is one packet, sent to every host; answers are told from others by our identifier and the
round's number, and a filter keeps all else from waking us. One socket does both: it sends by an
interface that is named anew each round, since an interface that was made anew has another index.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterable
from ipaddress import IPv4Address

from apagent.errors import KernelFault
from apagent.kernel import packet_filter
from apagent.kernel.packet_filter import DROP, KEEP, equals, load_byte, load_half

LATE_ROUNDS = 10
"""An answer to one of so many latest rounds still counts."""

_IP_UNICAST_IF = 50
"""linux/in.h"""
_ECHO_REPLY, _ECHO_REQUEST = 0, 8
_ECHO = struct.Struct(">BBHHH")
_ROUNDS = 1 << 16
_BARE_IPV4 = 0x45
"""Version 4 and a header of 20 bytes: what answers a request without options."""
_SOURCE = slice(12, 16)
_TYPE_AT, _IDENTIFIER_AT, _SEQUENCE_AT = 20, 24, 26
_ANSWER_SIZE = 28
_BUFFER = 1 << 20


class Pinger:
    """Pings hosts by one interface, from `source` if that is given.

    Raises KernelFault where there can be no such socket.
    """

    def __init__(self, interface: str, source: IPv4Address | None = None) -> None:
        self._interface = interface
        self._identifier = int.from_bytes(os.urandom(2), "big")
        self._round = 0
        self._answer = bytearray(_ANSWER_SIZE)
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

    def send(self, hosts: Iterable[str]) -> None:
        """Begin a round: one packet to each host. Who can't be sent to doesn't keep the others.

        Raises KernelFault if nothing can be sent to anybody, since the interface is gone or down.
        """
        self._round = (self._round + 1) % _ROUNDS
        try:
            index = socket.if_nametoindex(self._interface)
            self._socket.setsockopt(socket.SOL_IP, _IP_UNICAST_IF, socket.htonl(index))
        except OSError as error:
            raise self._fault(error) from None
        packet = _echo_request(self._identifier, self._round)
        sent, refusal = 0, None
        for host in hosts:
            try:
                sent += self._socket.sendto(packet, (host, 0))
            except OSError as error:
                refusal = error
        if refusal is not None and not sent:
            raise self._fault(refusal)

    def answered(self) -> set[bytes]:
        """The addresses that have answered a recent round since the last call; never blocks."""
        found: set[bytes] = set()
        answer = self._answer
        with contextlib.suppress(OSError):
            while self._socket.recv_into(answer):
                sequence = answer[_SEQUENCE_AT] << 8 | answer[_SEQUENCE_AT + 1]
                if (self._round - sequence) % _ROUNDS < LATE_ROUNDS:
                    found.add(bytes(answer[_SOURCE]))
        return found

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _fault(self, error: OSError) -> KernelFault:
        text = f"probes by {self._interface}: {error.strerror}"
        return KernelFault(text, error.errno or 0)


def _echo_request(identifier: int, sequence: int) -> bytes:
    total = (_ECHO_REQUEST << 8) + identifier + sequence
    total = (total & 0xFFFF) + (total >> 16)
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    return _ECHO.pack(_ECHO_REQUEST, 0, checksum, identifier, sequence)


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
