"""Events of nf_tables, as far as they tell whether our table is concerned."""

from __future__ import annotations

from apagent.kernel.nft.messages import HEADER
from apagent.kernel.wire import attributes

_TABLE_NAME = 1
"""NFTA_TABLE_NAME, NFTA_CHAIN_TABLE, NFTA_RULE_TABLE and so on: the first attribute of all of them
(linux/netfilter/nf_tables.h)."""


def names_table(body: bytes, table: str) -> bool:
    """Whether a message (without netlink header) speaks of `table` or of something in it."""
    name = table.encode() + b"\0"
    return any(
        type_ == _TABLE_NAME and payload == name for type_, payload in attributes(body, len(HEADER))
    )
