"""The UDP echo's datagrams: a sequence number; the answer adds the sender as the server saw it."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address

REQUEST = struct.Struct(">4sQ")
_SEEN = struct.Struct(">IH")
MAGIC = b"apEc"


def request(sequence: int) -> bytes:
    """A request with this sequence number."""
    return REQUEST.pack(MAGIC, sequence)


def answer(asked: bytes, address: str, port: int) -> bytes:
    """The answer to the datagram `asked`, which came from `address` and `port`."""
    return asked + _SEEN.pack(int(IPv4Address(address)), port)


def read_answer(data: bytes) -> tuple[int, str] | None:
    """Sequence number and sender ("address:port") in an answer; None: it is not one of ours."""
    if len(data) != REQUEST.size + _SEEN.size or not data.startswith(MAGIC):
        return None
    _, sequence = REQUEST.unpack_from(data)
    address, port = _SEEN.unpack_from(data, REQUEST.size)
    return sequence, f"{IPv4Address(address)}:{port}"
