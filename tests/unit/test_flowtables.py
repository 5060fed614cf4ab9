"""Flowtables in the ruleset, as the kernel lists them.

The messages are put together here, after nf_tables_fill_flowtable_info()
(net/netfilter/nf_tables_api.c): kernels without flow offload list none.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import cast

import pytest

from apagent.kernel.linux import LinuxDataPath
from apagent.kernel.nft.installed import read_flowtables
from apagent.kernel.wire import Message, Netlink, attribute

NFT_MSG_GETFLOWTABLE = 23
NFPROTO_INET = 1
NFTA_FLOWTABLE_TABLE, NFTA_FLOWTABLE_NAME, NFTA_FLOWTABLE_HOOK = 1, 2, 3
NFTA_FLOWTABLE_USE, NFTA_FLOWTABLE_HANDLE, NFTA_FLOWTABLE_FLAGS = 4, 5, 7
NFTA_FLOWTABLE_HOOK_NUM, NFTA_FLOWTABLE_HOOK_PRIORITY, NFTA_FLOWTABLE_HOOK_DEVS = 1, 2, 3
NFTA_DEVICE_NAME = 1
NESTED = 0x8000
"""linux/netfilter/nf_tables.h"""


def flowtable(table: str, name: str) -> bytes:
    """A flowtable like fw4's `ft`, without the netlink header."""
    devices = b"".join(attribute(NFTA_DEVICE_NAME, d + b"\0") for d in (b"br-lan", b"wan"))
    hook = b"".join(
        (
            attribute(NFTA_FLOWTABLE_HOOK_NUM, struct.pack(">I", 0)),
            attribute(NFTA_FLOWTABLE_HOOK_PRIORITY, struct.pack(">I", 0)),
            attribute(NFTA_FLOWTABLE_HOOK_DEVS | NESTED, devices),
        )
    )
    return struct.pack(">BBH", NFPROTO_INET, 0, 7) + b"".join(
        (
            attribute(NFTA_FLOWTABLE_TABLE, table.encode() + b"\0"),
            attribute(NFTA_FLOWTABLE_NAME, name.encode() + b"\0"),
            attribute(NFTA_FLOWTABLE_USE, struct.pack(">I", 1)),
            attribute(NFTA_FLOWTABLE_HANDLE, struct.pack(">Q", 12)),
            attribute(NFTA_FLOWTABLE_FLAGS, struct.pack(">I", 0)),
            attribute(NFTA_FLOWTABLE_HOOK | NESTED, hook),
        )
    )


class Listing:
    """A kernel that has these flowtables."""

    def __init__(self, *flowtables: bytes) -> None:
        self._flowtables = flowtables

    def dump(self, message: Message) -> Iterator[bytes]:
        assert message.type & 0xFF == NFT_MSG_GETFLOWTABLE
        return iter(self._flowtables)

    def flowtables(self) -> list[str]:
        return read_flowtables(cast(Netlink, self))


def test_flowtables_are_named_with_their_tables() -> None:
    assert Listing().flowtables() == []
    both = Listing(flowtable("fw4", "ft"), flowtable("other", "fast"))
    assert both.flowtables() == ["fw4/ft", "other/fast"]


def test_each_is_a_warning_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    path = LinuxDataPath()
    monkeypatch.setattr(path._nft, "flowtables", Listing(flowtable("fw4", "ft")).flowtables)
    (warning,) = path.warnings()
    path.close()
    assert "fw4/ft" in warning
    assert "turn flow offload off" in warning
