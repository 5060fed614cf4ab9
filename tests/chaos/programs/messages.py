"""What the two ends say to each other: short messages that can't be mistaken for others."""

from __future__ import annotations

import hashlib
import struct
from typing import NamedTuple

_HEAD = struct.Struct(">4sIQ")
_DIGEST = 16
SIZE = _HEAD.size + _DIGEST
"""Bytes of every message."""

UP, DOWN = b"up  ", b"down"
"""The first message of a connection: who will send."""
DATA = b"data"
SEEN = b"seen"
"""So many messages came in, all of them right and in order."""
END = b"end "
"""There are no more; the number says how many there were."""


class Broken(Exception):
    """What came in is not what was sent."""


class Message(NamedTuple):
    """What it is, of which flow, and its number in the flow."""

    tag: bytes
    flow: int
    number: int

    def pack(self) -> bytes:
        """Its bytes: `SIZE` of them."""
        head = _HEAD.pack(*self)
        return head + _digest(head)


def unpack(data: bytes) -> Message:
    """Read a message. Raises Broken."""
    head = data[: _HEAD.size]
    if len(data) != SIZE or data[_HEAD.size :] != _digest(head):
        raise Broken(f"{len(data)} bytes that nobody has sent: {data[:48].hex()}")
    return Message(*_HEAD.unpack(head))


def expect(data: bytes, wanted: Message) -> None:
    """Take this very message. Raises Broken."""
    if (found := unpack(data)) != wanted:
        raise Broken(f"{found} instead of {wanted}")


def _digest(head: bytes) -> bytes:
    return hashlib.blake2b(head, digest_size=_DIGEST).digest()
