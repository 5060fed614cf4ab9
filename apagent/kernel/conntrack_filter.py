"""Which conntrack events wake us: those of our clients' flows, and of updates only what is needed.

On an AP most events are of others: of IPv6, of the AP's own traffic, of networks that aren't ours.
What the kernel's usual layout of TCP and UDP shows to be none of our clients' is dropped before it
is queued; what is laid out in any other way (echoes, zones) is left for the parser to judge.
"""

from __future__ import annotations

import socket
import struct
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
    load_byte,
    load_half,
    load_word,
    masked,
)
from apagent.kernel.wire import NLM_F_CREATE

_DELETE = 1 << 8 | 2
"""IPCTNL_MSG_CT_DELETE of the subsystem ctnetlink (nfnetlink_conntrack.h)."""
_TYPE_AT, _FLAGS_AT, _FAMILY_AT = 4, 6, 16
"""In an event: nlmsg_type, nlmsg_flags, nfgen_family."""
_HEADS_AT, _SOURCE_AT, _REPLY_SOURCE_AT = (20, 28), 32, 84
"""In an event of TCP or UDP without a zone: headers of the original tuple and of its source; the
source, and that of the reply, who is a client if a port is forwarded to it."""
_HEADS = (struct.pack("=HH", 52, 1 | 0x8000), struct.pack("=HH", 8, 1))


def wanted_events(prefixes: Iterable[IPv4Network], updates_of: Iterable[IPv4Network]) -> bytes:
    """A filter for the flows of clients in `prefixes`, and for updates of those in `updates_of`.

    An update is of the same type as a new entry, but hasn't its flags.
    """
    updated, ours = (
        [
            step
            for prefix in of
            for at in (_SOURCE_AT, _REPLY_SOURCE_AT)
            for step in _source_in(at, prefix)
        ]
        for of in (updates_of, prefixes)
    )
    usual = [
        step
        for at, head in zip(_HEADS_AT, _HEADS, strict=True)
        for step in (load_word(at), equals(int.from_bytes(head, "big"), "", KEEP))
    ]
    return assemble(
        ("family", [load_byte(_FAMILY_AT), equals(socket.AF_INET, "", DROP)]),
        ("ended", [load_half(_TYPE_AT), equals(socket.htons(_DELETE), "layout")]),
        ("new", [load_half(_FLAGS_AT), has_bit(socket.htons(NLM_F_CREATE), "layout")]),
        ("updated", [*updated, go(DROP)]),
        ("layout", usual),
        ("ours", [*ours, go(DROP)]),
    )


def _source_in(at: int, prefix: IPv4Network) -> list[Step]:
    address = int(prefix.network_address)
    return [load_word(at), masked(int(prefix.netmask)), equals(address, KEEP)]
