"""What is installed in our nftables table, read back from the kernel."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from apagent.errors import KernelFault
from apagent.kernel.nft import messages
from apagent.kernel.nft.messages import HEADER, Hook, SetDefinition
from apagent.kernel.wire import Message, Netlink, attributes

_ATTEMPTS = 10
"""How often a listing is repeated that another program's transaction interrupted."""

_TABLE_NAME, _TABLE_FLAGS, _TABLE_OWNER = 1, 2, 7
_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_HOOK, _CHAIN_TYPE = 1, 3, 4, 7
_HOOK_NUMBER, _HOOK_PRIORITY = 1, 2
_RULE_TABLE, _RULE_CHAIN, _RULE_USERDATA = 1, 2, 7
_SET_TABLE, _SET_NAME, _SET_FLAGS, _SET_KEY_TYPE, _SET_KEY_LENGTH = 1, 2, 3, 4, 5
_SET_DATA_TYPE, _SET_DATA_LENGTH, _SET_COUNT = 6, 7, 20
_SET_FLAG_ANONYMOUS = 0x1
_LIST_ELEMENTS = 3
_ELEMENT_KEY, _ELEMENT_DATA = 1, 2
_DATA_VALUE, _DATA_VERDICT, _VERDICT_CHAIN = 1, 2, 2
_FLOWTABLE_TABLE, _FLOWTABLE_NAME = 1, 2
_OBJECT_TABLE, _OBJECT_NAME, _OBJECT_DATA = 1, 2, 4
_COUNTER_PACKETS = 2
_COMMENT = 0
"""Userdata item of a rule: its comment (libnftnl, libnftnl/udata.h)."""


@dataclass(slots=True)
class Installed:
    """One table, as far as it is static."""

    flags: int
    owner: int | None
    """Netlink port of the process that owns the table; None: nobody does."""
    chains: dict[str, Hook | None] = field(default_factory=dict)
    comments: dict[str, list[str]] = field(default_factory=dict)
    """Chain -> the comments of its rules, in order (empty: none)."""
    sets: dict[str, SetDefinition] = field(default_factory=dict)
    counters: set[str] = field(default_factory=set)
    verdicts: dict[str, dict[bytes, str]] = field(default_factory=dict)
    """Verdict map -> its elements: key -> chain."""


def read_installed(netlink: Netlink, table: str) -> Installed | None:
    """The table, or None if there is no such table. Raises KernelFault."""
    installed = read_table(netlink, table)
    if installed is None:
        return None
    installed.chains = dict(_chains(netlink, table))
    for chain, comment in _comments(netlink, table):
        installed.comments.setdefault(chain, []).append(comment)
    installed.sets = {definition.name: definition for definition in _sets(netlink, table)}
    installed.counters = set(read_counters(netlink, table))
    installed.verdicts = {
        name: read_verdicts(netlink, table, name)
        for name, definition in installed.sets.items()
        if definition.data_type == messages.VERDICT
    }
    return installed


def read_verdicts(netlink: Netlink, table: str, map_: str) -> dict[bytes, str]:
    """A verdict map's elements: key -> chain. Raises KernelFault."""
    return dict(_verdicts(netlink, table, map_))


def read_table(netlink: Netlink, table: str) -> Installed | None:
    """The table's flags and owner, nothing of what is in it; None: no such table.

    Raises KernelFault.
    """
    for attrs in _ours(netlink, messages.list_tables(), table, _TABLE_NAME):
        owner = attrs.get(_TABLE_OWNER)
        return Installed(_number(attrs[_TABLE_FLAGS]), _number(owner) if owner else None)
    return None


def read_counters(netlink: Netlink, table: str) -> dict[str, int]:
    """The packets that each named counter has counted. Raises KernelFault."""
    return {
        _text(attrs[_OBJECT_NAME]): int.from_bytes(
            dict(attributes(attrs[_OBJECT_DATA]))[_COUNTER_PACKETS], "big"
        )
        for attrs in _ours(netlink, messages.list_counters(table), table, _OBJECT_TABLE)
    }


def read_flowtables(netlink: Netlink) -> list[str]:
    """All flowtables, by anybody: "table/flowtable" each. Raises KernelFault."""
    found = (
        dict(attributes(body, len(HEADER))) for body in listing(netlink, messages.list_flowtables())
    )
    return [f"{_text(attrs[_FLOWTABLE_TABLE])}/{_text(attrs[_FLOWTABLE_NAME])}" for attrs in found]


def read_set_size(netlink: Netlink, table: str, set_: str) -> int | None:
    """How many elements a set has; None: the kernel doesn't say. Raises KernelFault."""
    name = set_.encode() + b"\0"
    for attrs in _ours(netlink, messages.list_sets(table), table, _SET_TABLE):
        if attrs[_SET_NAME] == name:
            return _number(attrs[_SET_COUNT]) if _SET_COUNT in attrs else None
    return None


def listing(netlink: Netlink, message: Message) -> list[bytes]:
    """A whole dump, repeated if a transaction came in between. Raises KernelFault."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return list(netlink.dump(message))
        except KernelFault as fault:
            if fault.errno != errno.EINTR:
                raise
    return list(netlink.dump(message))


def _ours(
    netlink: Netlink, message: Message, table: str, table_attribute: int
) -> Iterator[dict[int, bytes]]:
    """The dumped objects that are in `table`: kernels differ in what they filter themselves."""
    name = table.encode() + b"\0"
    for body in listing(netlink, message):
        attrs = dict(attributes(body, len(HEADER)))
        if attrs.get(table_attribute) == name:
            yield attrs


def _chains(netlink: Netlink, table: str) -> Iterator[tuple[str, Hook | None]]:
    for attrs in _ours(netlink, messages.list_chains(), table, _CHAIN_TABLE):
        hook = None
        if _CHAIN_HOOK in attrs:
            place = dict(attributes(attrs[_CHAIN_HOOK]))
            priority = int.from_bytes(place[_HOOK_PRIORITY], "big", signed=True)
            hook = Hook(_text(attrs[_CHAIN_TYPE]), _number(place[_HOOK_NUMBER]), priority)
        yield _text(attrs[_CHAIN_NAME]), hook


def _comments(netlink: Netlink, table: str) -> Iterator[tuple[str, str]]:
    for attrs in _ours(netlink, messages.list_rules(table), table, _RULE_TABLE):
        userdata = attrs.get(_RULE_USERDATA, b"")
        has_comment = len(userdata) > 2 and userdata[0] == _COMMENT
        comment = _text(userdata[2 : 2 + userdata[1]]) if has_comment else ""
        yield _text(attrs[_RULE_CHAIN]), comment


def _sets(netlink: Netlink, table: str) -> Iterator[SetDefinition]:
    """Named sets; an anonymous one comes and goes with its rule."""
    for attrs in _ours(netlink, messages.list_sets(table), table, _SET_TABLE):
        flags = _number(attrs.get(_SET_FLAGS, bytes(4)))
        if flags & _SET_FLAG_ANONYMOUS:
            continue
        is_map = bool(flags & messages.SET_FLAG_MAP)
        yield SetDefinition(
            _text(attrs[_SET_NAME]),
            _number(attrs[_SET_KEY_TYPE]),
            _number(attrs[_SET_KEY_LENGTH]),
            _number(attrs[_SET_DATA_TYPE]) if is_map else None,
            _number(attrs[_SET_DATA_LENGTH]) if is_map else 0,
            extra_flags=flags & ~messages.SET_FLAG_MAP,
        )


def _verdicts(netlink: Netlink, table: str, map_: str) -> Iterator[tuple[bytes, str]]:
    for body in listing(netlink, messages.list_elements(table, map_)):
        lists = dict(attributes(body, len(HEADER)))
        for _, element in attributes(lists.get(_LIST_ELEMENTS, b"")):
            parts = dict(attributes(element))
            key = dict(attributes(parts[_ELEMENT_KEY]))[_DATA_VALUE]
            data = dict(attributes(dict(attributes(parts[_ELEMENT_DATA]))[_DATA_VERDICT]))
            yield key, _text(data.get(_VERDICT_CHAIN, b""))


def _number(data: bytes) -> int:
    number: int = struct.unpack(">I", data)[0]
    return number


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode()
