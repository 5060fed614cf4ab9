"""ICMP echoes with a message in them (RFC 792)."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from tests.chaos.programs.messages import SIZE, Broken, Message
from tests.chaos.programs.messages import unpack as read

_HEAD = struct.Struct(">BBHHH")


class Echo(IntEnum):
    """The type of an ICMP message."""

    REPLY = 0
    REQUEST = 8


class Found(NamedTuple):
    """An echo of ours."""

    identifier: int
    message: Message


def echo_request(identifier: int, message: Message) -> bytes:
    """An ICMP echo request."""
    head = _HEAD.pack(Echo.REQUEST, 0, 0, identifier, message.number & 0xFFFF)
    packet = head + message.pack()
    return packet[:2] + struct.pack(">H", _checksum(packet)) + packet[4:]


def read_echo(packet: bytes, wanted: Echo) -> Found | None:
    """What a raw socket has received, IP header included; None: not one of ours."""
    offset = (packet[0] & 15) * 4
    if len(packet) != offset + _HEAD.size + SIZE:
        return None
    type_, _, _, identifier, _ = _HEAD.unpack_from(packet, offset)
    if type_ != wanted:
        return None
    try:
        return Found(identifier, read(packet[offset + _HEAD.size :]))
    except Broken:
        return None


def _checksum(packet: bytes) -> int:
    """RFC 1071."""
    total: int = sum(struct.unpack(f">{len(packet) // 2}H", packet))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF
