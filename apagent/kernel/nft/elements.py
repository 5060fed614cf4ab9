"""Elements of the session maps: packed and parsed with struct, thousands in a message.

A map's key is a concatenation: each field in network order, padded to 4 bytes. Its value is an
anchor's number as skb priority, in host order. An attribute's length has 16 bits, so a list of
elements ends below 64 KiB and a transaction takes several messages.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from ipaddress import IPv4Address
from typing import NamedTuple

from pyroute2.netlink.nfnetlink.nftsocket import NFT_MSG_DELSETELEM, NFT_MSG_NEWSETELEM

from apagent.core.domain import tunnel_mac
from apagent.core.model import ICMP, ApId, FlowKey, Mac, SocketKey
from apagent.kernel.nft.messages import HEADER, NESTED, message_type
from apagent.kernel.wire import NLM_F_CREATE, Message, attribute, attributes

FLOW_SIZE, ECHO_SIZE, SOCKET_SIZE, CLIENT_SIZE, UPLINK_SIZE = 20, 12, 12, 12, 16
"""Bytes of a key in the flow, echo and socket maps (that of forwards has sockets, too), in the sets
of clients and in the map of sources."""
TARGET_SIZE = 8
"""Bytes of a value in the map of forwards; 4 in all others."""
_UNKNOWN_AP = "#"
CHANGES_PER_TRANSACTION = 4096
"""Keeps a transaction below 320 KiB, which fits a send buffer that an unprivileged user gets."""

_LIST_TABLE, _LIST_SET, _LIST_ELEMENTS = 1, 2, 3
_LIST_ITEM = 1
_ELEMENT_KEY, _ELEMENT_DATA = 1, 2
_DATA_VALUE = 1
_MAX_LIST = 0xFFFF - 4

_HEAD = struct.Struct("=HHHHHH")
"""Element, its key, the key's value: length and type of each."""
_DATA = struct.Struct("=HHHH")
"""The data, its value: length and type of each."""
_FLOW_PARTS, _PADDED_FLOW = struct.Struct("9s2s2s"), struct.Struct("9s3x2s2x2s2x")
_LENGTH = struct.Struct("=H")
_LIST_HEAD = struct.Struct("=HH")


class ElementChange(NamedTuple):
    """One element's way from before to after; the key is packed for the kernel."""

    set: str
    key: bytes
    deleted: bool
    """The key is in the set and goes (or gets another value)."""
    data: bytes | None
    """The packed new data (empty for a set's element); None: no new element."""


class ElementChanges(NamedTuple):
    """The same way for many elements of a set."""

    set: str
    keys: Sequence[bytes]
    deleted: bool
    data: bytes | None


def pack_flow(key: FlowKey) -> bytes:
    """Client, remote, protocol, client port, remote port: 20 bytes."""
    return b"%b\0\0\0%b\0\0%b\0\0" % (key[:9], key[9:11], key[11:])


def pack_flows(keys: Iterable[FlowKey]) -> list[bytes]:
    """`pack_flow` of many."""
    pack = _PADDED_FLOW.pack
    return [pack(*parts) for parts in _FLOW_PARTS.iter_unpack(b"".join(keys))]


def unpack_flow(key: bytes) -> FlowKey:
    """What `pack_flow` packed."""
    return FlowKey(key[:9] + key[12:14] + key[16:18])


def pack_echo(key: FlowKey) -> bytes:
    """Client, remote, identifier: 12 bytes."""
    return b"%b%b\0\0" % (key[:8], key[9:11])


_ICMP_BYTE = bytes([ICMP])


def unpack_echo(key: bytes) -> FlowKey:
    """What `pack_echo` packed."""
    return FlowKey(b"%b%b%b\0\0" % (key[:8], _ICMP_BYTE, key[8:10]))


def pack_socket(key: SocketKey) -> bytes:
    """Address, protocol, port: 12 bytes."""
    return b"%b\0\0\0%b\0\0" % (key[:5], key[5:])


def unpack_socket(key: bytes) -> SocketKey:
    """What `pack_socket` packed."""
    return SocketKey(key[:5] + key[8:10])


def pack_target(key: SocketKey) -> bytes:
    """To where a port is forwarded: address, port; the protocol stays. 8 bytes."""
    return b"%b%b\0\0" % (key[:4], key[5:])


def unpack_target(value: bytes, outside: SocketKey) -> SocketKey:
    """What `pack_target` packed, of what comes to the socket `outside`."""
    return SocketKey(value[:4] + outside[4:5] + value[4:6])


def pack_client(address: IPv4Address, mac: Mac) -> bytes:
    """A client's address and MAC: 12 bytes."""
    return address.packed + bytes.fromhex(mac.replace(":", "")) + b"\0\0"


def unpack_client(key: bytes) -> tuple[IPv4Address, Mac]:
    """What `pack_client` packed."""
    return IPv4Address(key[:4]), Mac(key[4:10].hex(":"))


def pack_place(address: IPv4Address, ap: ApId) -> bytes:
    """A client's address and the tunnel MAC of its serving AP: 12 bytes.

    `ap` may be what `unpack_place` made of an AP that it doesn't know.
    """
    unknown = ap.startswith(_UNKNOWN_AP)
    return pack_client(address, Mac(ap.removeprefix(_UNKNOWN_AP)) if unknown else tunnel_mac(ap))


def unpack_place(key: bytes, aps: Mapping[Mac, ApId]) -> tuple[IPv4Address, ApId]:
    """What `pack_place` packed; an AP that isn't in `aps` is `#` and its MAC."""
    address, mac = unpack_client(key)
    return address, aps.get(mac, ApId(_UNKNOWN_AP + mac))


def pack_data(value: bytes) -> bytes:
    """A map's value (whole words), as the data of an element."""
    size = _DATA.size + len(value)
    return _DATA.pack(size, _ELEMENT_DATA | NESTED, size - 4, _DATA_VALUE) + value


def transactions(
    table: str, changes: Iterable[ElementChange | ElementChanges]
) -> Iterator[list[Message]]:
    """The changes as messages, a transaction at a time.

    A changed value is deleted and added in one transaction, so that no packet misses it.
    """
    for batch in _parts(changes):
        deleted: dict[str, list[bytes]] = {}
        added: dict[str, list[bytes]] = {}
        for set_, keys, was, data in batch:
            if was:
                deleted.setdefault(set_, []).extend(_elements(keys, b""))
            if data is not None:
                added.setdefault(set_, []).extend(_elements(keys, data))
        yield [
            message
            for command, flags, sets in (
                (NFT_MSG_DELSETELEM, 0, deleted),
                (NFT_MSG_NEWSETELEM, NLM_F_CREATE, added),
            )
            for set_, elements in sets.items()
            for message in _messages(command, flags, table, set_, elements)
        ]


def _parts(changes: Iterable[ElementChange | ElementChanges]) -> Iterator[list[ElementChanges]]:
    """Changes of `CHANGES_PER_TRANSACTION` elements at a time."""
    part: list[ElementChanges] = []
    room = CHANGES_PER_TRANSACTION
    for change in changes:
        set_, keys, deleted, data = (
            change
            if isinstance(change, ElementChanges)
            else ElementChanges(change.set, (change.key,), change.deleted, change.data)
        )
        while keys:
            some, keys = keys[:room], keys[room:]
            part.append(ElementChanges(set_, some, deleted, data))
            room -= len(some)
            if not room:
                yield part
                part, room = [], CHANGES_PER_TRANSACTION
    if part:
        yield part


def renewal(table: str, set_: str, keys: Iterable[bytes]) -> list[Message]:
    """Requests that give elements of a set their whole timeout, be they there or not.

    An element that is added again keeps its age. Deleting one that isn't there fails, and a failed
    transaction costs the caller more than 10 ms, in which the kernel waits for all its processors
    (synchronize_rcu() in __nf_tables_abort()). So each is added, deleted and added.
    """
    elements = _elements(tuple(keys), b"")
    if not elements:
        return []
    add, delete = (NFT_MSG_NEWSETELEM, NLM_F_CREATE), (NFT_MSG_DELSETELEM, 0)
    return [
        message
        for command, flags in (add, delete, add)
        for message in _messages(command, flags, table, set_, elements)
    ]


def parse_elements(
    body: bytes, key_size: int, value_size: int = 4
) -> Iterator[tuple[bytes, bytes]]:
    """Key and value (empty in a set) of each element in a message of a dump.

    The kernel puts the key first and the data second (nf_tables_fill_setelem()); what else it may
    put, such as a comment that somebody added, is skipped.
    """
    for type_, items in attributes(body, len(HEADER)):
        if type_ == _LIST_ELEMENTS:
            yield from _parse_list(items, key_size, value_size)


def _parse_list(items: bytes, key_size: int, value_size: int) -> Iterator[tuple[bytes, bytes]]:
    key_at = _HEAD.size
    data_at = key_at + key_size
    value_at = data_at + _DATA.size
    value_end = value_at + value_size
    offset, end = 0, len(items)
    length_of = _LENGTH.unpack_from
    while offset < end:
        (length,) = length_of(items, offset)
        yield (
            items[offset + key_at : offset + data_at],
            items[offset + value_at : offset + value_end] if length > data_at else b"",
        )
        offset += (length + 3) & ~3


@cache
def _element_head(key_size: int, data_size: int) -> bytes:
    """All attribute headers of an element up to its key."""
    return _HEAD.pack(
        _HEAD.size + key_size + data_size,
        _LIST_ITEM | NESTED,
        8 + key_size,
        _ELEMENT_KEY | NESTED,
        4 + key_size,
        _DATA_VALUE,
    )


def _elements(keys: Sequence[bytes], data: bytes) -> list[bytes]:
    """Elements with keys of one size and the same data."""
    if not keys:
        return []
    head = _element_head(len(keys[0]), len(data))
    return [head + key + data for key in keys]


def _messages(
    command: int, flags: int, table: str, set_: str, elements: Sequence[bytes]
) -> Iterator[Message]:
    """Elements of one size, in as few messages as their lists' lengths allow."""
    start = (
        HEADER
        + attribute(_LIST_TABLE, table.encode() + b"\0")
        + attribute(_LIST_SET, set_.encode() + b"\0")
    )
    what = f"elements of inet {table} {set_}"
    step = _MAX_LIST // len(elements[0])
    for i in range(0, len(elements), step):
        items = b"".join(elements[i : i + step])
        head = _LIST_HEAD.pack(_LIST_HEAD.size + len(items), _LIST_ELEMENTS | NESTED)
        yield Message(message_type(command), flags, start + head + items, what)
