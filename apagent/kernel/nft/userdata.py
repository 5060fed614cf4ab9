"""What nft keeps with a set so that it can print it again: byte orders and `typeof` expressions.

The kernel stores it unread. A list of items of one byte type, one byte length and payload
(libnftnl, include/udata.h and libnftnl/udata.h); an expression's number is nft's own.
"""

from __future__ import annotations

import struct
from enum import IntEnum

_KEY_BYTE_ORDER, _DATA_BYTE_ORDER, _KEY_TYPEOF, _DATA_TYPEOF = 0, 1, 3, 4
_EXPRESSION_KIND, _EXPRESSION_DATA = 0, 1
_PAYLOAD, _META, _CONCATENATION = 7, 9, 13
"""nft's kinds of expressions (nftables, include/expression.h, enum expr_types)."""
_PAYLOAD_HEADER, _PAYLOAD_FIELD, _PAYLOAD_BITS = 0, 1, 4
_META_KEY = 0
_META_PRIORITY = 2
_IP, _ICMP = 12, 4
_IP_SADDR, _IP_DADDR, _ICMP_ID = 11, 12, 4
"""Headers and their fields (nftables, include/proto.h)."""
_ICMP_ID_BITS = 16

_U32 = struct.Struct("=I")


class ByteOrder(IntEnum):
    """Of a whole key or value; a concatenation has none."""

    MIXED = 0
    HOST = 1
    NETWORK = 2


def _item(type_: int, payload: bytes) -> bytes:
    return bytes([type_, len(payload)]) + payload


def _number(type_: int, number: int) -> bytes:
    return _item(type_, _U32.pack(number))


def _expression(kind: int, data: bytes) -> bytes:
    return _number(_EXPRESSION_KIND, kind) + _item(_EXPRESSION_DATA, data)


def _field(header: int, field: int) -> bytes:
    return _number(_PAYLOAD_HEADER, header) + _number(_PAYLOAD_FIELD, field)


_ECHO_KEY = _expression(
    _CONCATENATION,
    b"".join(
        _item(position, _expression(_PAYLOAD, field))
        for position, field in enumerate(
            (
                _field(_IP, _IP_SADDR),
                _field(_IP, _IP_DADDR),
                _field(_ICMP, _ICMP_ID) + _number(_PAYLOAD_BITS, _ICMP_ID_BITS),
            )
        )
    ),
)
"""`ip saddr . ip daddr . icmp id`: the identifier has no type, only `typeof` names it."""


def byte_orders(key: ByteOrder, data: ByteOrder | None = None) -> bytes:
    """The byte order of a set's keys and, in a map, of its values."""
    orders = _number(_KEY_BYTE_ORDER, key)
    return orders if data is None else orders + _number(_DATA_BYTE_ORDER, data)


def echo_map() -> bytes:
    """`typeof ip saddr . ip daddr . icmp id : meta priority`."""
    return (
        byte_orders(ByteOrder.MIXED, ByteOrder.HOST)
        + _item(_KEY_TYPEOF, _ECHO_KEY)
        + _item(_DATA_TYPEOF, _expression(_META, _number(_META_KEY, _META_PRIORITY)))
    )
