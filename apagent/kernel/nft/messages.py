"""nf_tables requests on tables, chains, rules, sets and counters of the inet family.

pyroute2's message classes do the packing, save for objects, which it has no class for. Constants:
linux/netfilter/nf_tables.h and linux/netfilter/nfnetlink.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pyroute2.netlink import nla
from pyroute2.netlink.nfnetlink import nfgen_msg
from pyroute2.netlink.nfnetlink.nftsocket import (
    NFPROTO_INET,
    NFT_MSG_DELCHAIN,
    NFT_MSG_DELOBJ,
    NFT_MSG_DELRULE,
    NFT_MSG_DELSET,
    NFT_MSG_DELSETELEM,
    NFT_MSG_DELTABLE,
    NFT_MSG_GETCHAIN,
    NFT_MSG_GETFLOWTABLE,
    NFT_MSG_GETOBJ,
    NFT_MSG_GETRULE,
    NFT_MSG_GETSET,
    NFT_MSG_GETSETELEM,
    NFT_MSG_GETTABLE,
    NFT_MSG_NEWCHAIN,
    NFT_MSG_NEWOBJ,
    NFT_MSG_NEWRULE,
    NFT_MSG_NEWSET,
    NFT_MSG_NEWSETELEM,
    NFT_MSG_NEWTABLE,
    nft_chain_msg,
    nft_has_comment,
    nft_rule_msg,
    nft_set_elem_list_msg,
    nft_set_msg,
    nft_table_msg,
)

from apagent.kernel.nft.expressions import Expression
from apagent.kernel.wire import (
    NLM_F_CREATE,
    NLM_F_DUMP,
    Message,
    attribute,
    encode,
)

_SUBSYSTEM = 10
"""NFNL_SUBSYS_NFTABLES."""
_BATCH_BEGIN, _BATCH_END = 16, 17
_NLM_F_APPEND = 0x800
NESTED = 0x8000
"""NLA_F_NESTED."""

_GENERIC = struct.Struct(">BBH")
"""struct nfgenmsg: family, version, resource id."""
HEADER = _GENERIC.pack(NFPROTO_INET, 0, 0)
BEGIN = Message(_BATCH_BEGIN, 0, _GENERIC.pack(0, 0, _SUBSYSTEM), "nftables transaction")
END = Message(_BATCH_END, 0, _GENERIC.pack(0, 0, _SUBSYSTEM))

_TABLE_FLAG_OWNER, _TABLE_FLAG_PERSIST = 0x2, 0x4
OWNED = _TABLE_FLAG_OWNER | _TABLE_FLAG_PERSIST
"""Only the socket that made or adopted the table may change it, and the table outlives the socket
(Linux 6.9)."""
OWNER, PERSIST = _TABLE_FLAG_OWNER, _TABLE_FLAG_PERSIST

SET_FLAG_MAP, SET_FLAG_TIMEOUT, SET_FLAG_DYNAMIC = 0x8, 0x10, 0x20
"""NFT_SET_MAP, NFT_SET_TIMEOUT, NFT_SET_EVAL."""
_SET_FLAG_NAMES = {
    SET_FLAG_MAP: "NFT_SET_MAP",
    SET_FLAG_TIMEOUT: "NFT_SET_TIMEOUT",
    SET_FLAG_DYNAMIC: "NFT_SET_EVAL",
}
VERDICT = 0xFFFFFF00
"""NFT_DATA_VERDICT: the data type of a verdict map."""
_OBJECT_COUNTER = 1
_NFTA_OBJ_TABLE, _NFTA_OBJ_NAME, _NFTA_OBJ_TYPE, _NFTA_OBJ_DATA = 1, 2, 3, 4
_POLICY_ACCEPT = 1


@dataclass(frozen=True, slots=True)
class Hook:
    """Where a base chain hangs: its type, the hook's number, its priority there."""

    type: str
    number: int
    priority: int


@dataclass(frozen=True, slots=True)
class SetDefinition:
    """What makes a set or map what it is; types are nft's (the kernel only stores them)."""

    name: str
    key_type: int
    key_length: int
    data_type: int | None = None
    data_length: int = 0
    userdata: bytes = field(default=b"", compare=False)
    """For nft, which prints the set by it."""
    extra_flags: int = 0
    """Flags beyond NFT_SET_MAP."""
    timeout_ms: int = field(default=0, compare=False)
    """Life of an element; 0: no end. Goes with SET_FLAG_TIMEOUT in `extra_flags`."""
    size: int = field(default=0, compare=False)
    """The most elements; 0: no limit."""

    @property
    def flags(self) -> int:
        """All of its flags."""
        return self.extra_flags | (0 if self.data_type is None else SET_FLAG_MAP)


class _RuleMessage(nfgen_msg, nft_has_comment):  # type: ignore[misc]
    """pyroute2's rule, with the log expression as the kernel has it: group of 16 bits.

    Not a subclass of `nft_rule_msg`: it would inherit what that has compiled its map to.
    """

    prefix = nft_rule_msg.prefix
    nla_map = nft_rule_msg.nla_map

    class nft_expr(nft_rule_msg.nft_expr):  # type: ignore[misc]  # noqa: N801 - named by pyroute2
        """One expression."""

        class nft_log(nla):  # type: ignore[misc]  # noqa: N801 - named by pyroute2
            """`log`: enum nft_log_attributes."""

            nla_map = (
                ("NFTA_LOG_UNSPEC", "none"),
                ("NFTA_LOG_GROUP", "be16"),
                ("NFTA_LOG_PREFIX", "asciiz"),
                ("NFTA_LOG_SNAPLEN", "be32"),
            )


def message_type(command: int) -> int:
    """The netlink message type of an nf_tables command."""
    return _SUBSYSTEM << 8 | command


def _pack(
    codec: Any,  # noqa: ANN401 - pyroute2 is untyped
    attrs: Iterable[tuple[str, Any]],
) -> bytes:
    message = codec()
    message["nfgen_family"] = NFPROTO_INET
    message["attrs"] = [(codec.prefix + name, value) for name, value in attrs]
    return encode(message)


def _message(command: int, body: bytes, what: str, flags: int = 0) -> Message:
    return Message(message_type(command), flags, body, what)


def new_table(table: str, flags: int) -> Message:
    """Create the table, or (flags permitting) adopt it."""
    body = _pack(nft_table_msg, [("NAME", table), ("FLAGS", flags)])
    return _message(NFT_MSG_NEWTABLE, body, f"table inet {table}", NLM_F_CREATE)


def delete_table(table: str) -> Message:
    """Delete the table and all that is in it."""
    body = _pack(nft_table_msg, [("NAME", table)])
    return _message(NFT_MSG_DELTABLE, body, f"delete table inet {table}")


def new_chain(table: str, chain: str, hook: Hook | None) -> Message:
    """Create a chain; with `hook` a base chain of policy accept."""
    attrs: list[tuple[str, Any]] = [("TABLE", table), ("NAME", chain)]
    if hook is not None:
        place = [("NFTA_HOOK_HOOKNUM", hook.number), ("NFTA_HOOK_PRIORITY", hook.priority)]
        attrs += [
            ("HOOK", {"attrs": place}),
            ("POLICY", _POLICY_ACCEPT),
            ("TYPE", hook.type),
        ]
    body = _pack(nft_chain_msg, attrs)
    return _message(NFT_MSG_NEWCHAIN, body, f"chain inet {table} {chain}", NLM_F_CREATE)


def delete_chain(table: str, chain: str) -> Message:
    """Delete an empty chain that nothing refers to."""
    body = _pack(nft_chain_msg, [("TABLE", table), ("NAME", chain)])
    return _message(NFT_MSG_DELCHAIN, body, f"delete chain inet {table} {chain}")


def new_rule(
    table: str, chain: str, expressions: Iterable[Expression], comment: str = ""
) -> Message:
    """Append a rule to a chain."""
    attrs: list[tuple[str, Any]] = [
        ("TABLE", table),
        ("CHAIN", chain),
        ("EXPRESSIONS", list(expressions)),
    ]
    if comment:
        attrs.append(("USERDATA", {"value": comment}))
    body = _pack(_RuleMessage, attrs)
    flags = NLM_F_CREATE | _NLM_F_APPEND
    return _message(NFT_MSG_NEWRULE, body, f"rule in chain inet {table} {chain}", flags)


def flush_chain(table: str, chain: str) -> Message:
    """Delete all rules of a chain."""
    body = _pack(_RuleMessage, [("TABLE", table), ("CHAIN", chain)])
    return _message(NFT_MSG_DELRULE, body, f"flush chain inet {table} {chain}")


def new_set(table: str, definition: SetDefinition, set_id: int) -> Message:
    """Create a set or map; `set_id` is any number that is unique in the transaction."""
    attrs: list[tuple[str, Any]] = [
        ("TABLE", table),
        ("NAME", definition.name),
        ("ID", set_id),
        ("KEY_TYPE", definition.key_type),
        ("KEY_LEN", definition.key_length),
        ("USERDATA", definition.userdata),
    ]
    names = [name for flag, name in _SET_FLAG_NAMES.items() if definition.flags & flag]
    if names:
        attrs.append(("FLAGS", names))
    if definition.timeout_ms:
        attrs.append(("TIMEOUT", definition.timeout_ms))
    if definition.size:
        attrs.append(("DESC", {"attrs": [("NFTA_SET_DESC_SIZE", definition.size)]}))
    if definition.data_type is not None:
        attrs += [("DATA_TYPE", definition.data_type), ("DATA_LEN", definition.data_length)]
    body = _pack(nft_set_msg, attrs)
    return _message(NFT_MSG_NEWSET, body, f"set inet {table} {definition.name}", NLM_F_CREATE)


def delete_set(table: str, name: str) -> Message:
    """Delete a set or map with all its elements; no rule may refer to it."""
    body = _pack(nft_set_msg, [("TABLE", table), ("NAME", name)])
    return _message(NFT_MSG_DELSET, body, f"delete set inet {table} {name}")


def _element(table: str, set_: str, key: bytes, data: dict[str, Any] | None) -> bytes:
    attrs: list[tuple[str, Any]] = [("NFTA_SET_ELEM_KEY", {"attrs": [("NFTA_DATA_VALUE", key)]})]
    if data is not None:
        attrs.append(("NFTA_SET_ELEM_DATA", data))
    return _pack(
        nft_set_elem_list_msg,
        [("TABLE", table), ("SET", set_), ("ELEMENTS", [{"attrs": attrs}])],
    )


def new_verdict(table: str, map_: str, key: bytes, data: dict[str, Any]) -> Message:
    """Add an element to a verdict map; the session maps' go through `elements`."""
    body = _element(table, map_, key, data)
    return _message(NFT_MSG_NEWSETELEM, body, f"element of inet {table} {map_}", NLM_F_CREATE)


def delete_verdict(table: str, map_: str, key: bytes) -> Message:
    """Delete an element of a verdict map."""
    body = _element(table, map_, key, None)
    return _message(NFT_MSG_DELSETELEM, body, f"delete element of inet {table} {map_}")


def _object(table: str, name: str) -> bytes:
    return (
        HEADER
        + attribute(_NFTA_OBJ_TABLE, table.encode() + b"\0")
        + attribute(_NFTA_OBJ_NAME, name.encode() + b"\0")
        + attribute(_NFTA_OBJ_TYPE, struct.pack(">I", _OBJECT_COUNTER))
    )


def new_counter(table: str, name: str) -> Message:
    """Create a named counter."""
    body = _object(table, name) + attribute(_NFTA_OBJ_DATA | NESTED, b"")
    return _message(NFT_MSG_NEWOBJ, body, f"counter inet {table} {name}", NLM_F_CREATE)


def delete_counter(table: str, name: str) -> Message:
    """Delete a named counter; no rule may refer to it."""
    return _message(NFT_MSG_DELOBJ, _object(table, name), f"delete counter inet {table} {name}")


def list_tables() -> Message:
    """All tables of the family."""
    return _message(NFT_MSG_GETTABLE, HEADER, "list tables", NLM_F_DUMP)


def list_chains() -> Message:
    """All chains of the family."""
    return _message(NFT_MSG_GETCHAIN, HEADER, "list chains", NLM_F_DUMP)


def list_rules(table: str) -> Message:
    """The table's rules."""
    body = _pack(_RuleMessage, [("TABLE", table)])
    return _message(NFT_MSG_GETRULE, body, f"list rules of inet {table}", NLM_F_DUMP)


def list_sets(table: str) -> Message:
    """The table's sets and maps."""
    body = _pack(nft_set_msg, [("TABLE", table)])
    return _message(NFT_MSG_GETSET, body, f"list sets of inet {table}", NLM_F_DUMP)


def list_counters(table: str) -> Message:
    """The table's named counters."""
    body = (
        HEADER
        + attribute(_NFTA_OBJ_TABLE, table.encode() + b"\0")
        + attribute(_NFTA_OBJ_TYPE, struct.pack(">I", _OBJECT_COUNTER))
    )
    return _message(NFT_MSG_GETOBJ, body, f"list counters of inet {table}", NLM_F_DUMP)


def list_elements(table: str, set_: str) -> Message:
    """The elements of a set or map."""
    body = _pack(nft_set_elem_list_msg, [("TABLE", table), ("SET", set_)])
    return _message(NFT_MSG_GETSETELEM, body, f"list inet {table} {set_}", NLM_F_DUMP)


def list_flowtables() -> Message:
    """All flowtables of every family."""
    every_family = _GENERIC.pack(0, 0, 0)
    return _message(NFT_MSG_GETFLOWTABLE, every_family, "list flowtables", NLM_F_DUMP)
