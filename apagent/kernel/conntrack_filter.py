"""Which conntrack events wake us: of updates, only those of networks with takeover."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from ipaddress import IPv4Network

from apagent.kernel.packet_filter import (
    DROP,
    KEEP,
    Step,
    assemble,
    equals,
    go,
    has_bit,
    load_half,
    load_word,
    masked,
)
from apagent.kernel.wire import NLM_F_CREATE

_DELETE = 1 << 8 | 2
"""IPCTNL_MSG_CT_DELETE of the subsystem ctnetlink (nfnetlink_conntrack.h)."""
_TYPE_AT, _FLAGS_AT, _SOURCE_AT = 4, 6, 32
"""In an event: nlmsg_type, nlmsg_flags, and the source of the original direction."""


def updates_of(prefixes: Iterable[IPv4Network]) -> bytes:
    """A filter that drops updates, but for those of flows that clients in `prefixes` have opened.

    An update is of the same type as a new entry, but hasn't its flags.
    """
    ours: list[Step] = []
    for prefix in prefixes:
        address = int(prefix.network_address)
        ours += [load_word(_SOURCE_AT), masked(int(prefix.netmask)), equals(address, KEEP)]
    return assemble(
        ("ended", [load_half(_TYPE_AT), equals(socket.htons(_DELETE), KEEP)]),
        ("new", [load_half(_FLAGS_AT), has_bit(socket.htons(NLM_F_CREATE), KEEP)]),
        ("updated", [*ours, go(DROP)]),
    )
