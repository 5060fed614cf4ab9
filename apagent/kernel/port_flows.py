"""Conntrack events of TCP and UDP, read at fixed offsets: the hottest loop of an anchor.

The kernel lays these messages out the same way every time: netlink header, nfgenmsg, the tuple of
the original direction, that of the reply, the entry's id, its status. All that has to be right for
a message to be read like this (kind of message, headers of all attributes, the client's prefix, TCP
or UDP) is compared at once: the bytes, as one number, under a mask, must be a number that was
prepared. What is different in any way is left to the reader of general messages
(`apagent.kernel.conntrack`), which gives the same result, only later.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count, product

from apagent.core.domain import Network
from apagent.core.model import ESTABLISHED, TCP, UDP, FlowKey, Nat, NetworkName

Changes = dict[FlowKey, Nat | None]

_NEW, _DELETE = 1 << 8, 1 << 8 | 2
"""IPCTNL_MSG_CT_NEW and _DELETE of the subsystem ctnetlink (nfnetlink_conntrack.h)."""
_NESTED = 0x8000
_ASSURED = 0x04
"""IPS_ASSURED (nf_conntrack_common.h)."""
_UNKNOWN_GENERATION = bytes(4)
_TAILS = {
    True: tuple(
        _UNKNOWN_GENERATION + bytes([ESTABLISHED if status & _ASSURED else 0])
        for status in range(256)
    ),
    False: (_UNKNOWN_GENERATION + b"\0",) * 256,
}
"""Whether a network's sessions say so much -> by low byte of the status: how a `Nat` ends."""

_START, _TUPLES_END, _STATUS_AT = 4, 124, 136
"""From the message's type to the value of the status; nlmsg_len stands before."""
_SIZE = _STATUS_AT + 4
_SOURCE_AT = 32
_FIELDS = "=I28x 4s 4x 4s 8x 1s 7x 2s 6x 2s 22x 4s 24x 2s 2x 15x B"
"""nlmsg_len; client, remote, protocol, their ports; destination and its port of the reply; status.
"""
_BODY = 16
"""Where a message's body begins: behind the netlink header."""
_LISTED_FIELDS = struct.Struct("=16x 4s 4x 4s 8x 1s 7x 2s 6x 2s 22x 4s 24x 2s 2x")
"""The same of the body of a listed entry, in which the status has no place of its own."""


def _layout(type_: int, source: int, protocol: int) -> bytes:
    """A message from its type on, all that isn't compared zero."""
    head = struct.pack("=H10x4s", type_, b"\x02\0\0\0")  # nlmsg_type; nfgenmsg: AF_INET, version 0
    id_and_status = struct.pack("=HH4xHH", 8, 12, 8, 3)
    return head + _tuple(1, source, protocol) + _tuple(2, 0, protocol) + id_and_status


def _tuple(number: int, source: int, protocol: int) -> bytes:
    """A tuple: attribute headers as the kernel writes them (ctnetlink_dump_tuples())."""
    addresses = struct.pack("=HHHH4sHH4x", 20, 1 | _NESTED, 8, 1, source.to_bytes(4, "big"), 8, 2)
    ports = struct.pack("=HHHHB3xHH4xHH4x", 28, 2 | _NESTED, 5, 1, protocol, 6, 2, 6, 3)
    return struct.pack("=HH", 52, number | _NESTED) + addresses + ports


def _mask(netmask: int, *, with_status: bool) -> int:
    """Ones where a message is compared."""
    mask = bytearray(b"\xff" * (_STATUS_AT - _START))
    ignored = (
        (6, 16),  # flags, sequence number, port id
        (18, 20),  # resource id: of the namespace's generation, in some kernels
        (40, 44),  # remote
        (60, 64),  # ports and their padding
        (68, 72),
        (84, 88),  # the reply's addresses and ports
        (92, 96),
        (112, 116),
        (120, 124),
        (_TUPLES_END + 4 if with_status else _TUPLES_END, _STATUS_AT - 4),
        (_STATUS_AT if with_status else _STATUS_AT - 4, _STATUS_AT),
    )
    for start, end in ignored:
        mask[start - _START : end - _START] = bytes(end - start)
    mask[_SOURCE_AT - _START : _SOURCE_AT - _START + 4] = netmask.to_bytes(4, "big")
    return int.from_bytes(mask, "big")


def _of_tuples(bits: int) -> int:
    """What stands for nfgenmsg and the tuples, of what stands for a message from its type on."""
    return bits >> 8 * (_STATUS_AT - _TUPLES_END) & (1 << 8 * _LISTED_FIELDS.size) - 1


class PortFlowReader:
    """Reads the flows of some networks (those with a zone have another layout).

    Of datagrams in a buffer, number n at n times `size`.
    """

    def __init__(self, networks: Iterable[Network], size: int) -> None:
        self._size = size
        compared = f"={_START}x {_STATUS_AT - _START}s {size - _STATUS_AT}x"
        self._compared = struct.Struct(compared).iter_unpack
        self._fields = struct.Struct(f"{_FIELDS} {size - _SIZE}x").iter_unpack
        self._known: dict[int, dict[int, tuple[NetworkName, bool, tuple[bytes, ...]]]] = {}
        """Mask -> what may be under it -> the network, whether the flow has ended, and how its
        `Nat` ends."""
        self._listed: dict[int, dict[int, NetworkName]] = {}
        """The same of listed entries, of networks whose sessions need no status."""
        for network in networks:
            if not network.zone:
                self._add(network)

    def _add(self, network: Network) -> None:
        prefix = network.prefix
        mask = _mask(int(prefix.netmask), with_status=network.takeover)
        known = self._known.setdefault(mask, {})
        for type_, protocol in product((_NEW, _DELETE), (TCP, UDP)):
            layout = _layout(type_, int(prefix.network_address), protocol)
            said = int.from_bytes(layout, "big") & mask
            known[said] = network.name, type_ == _DELETE, _TAILS[network.takeover]
        if not network.takeover:
            listed = self._listed.setdefault(_of_tuples(mask), {})
            listed.update({_of_tuples(said): name for said, (name, *_) in known.items()})

    def read_listed(self, body: bytes) -> tuple[NetworkName, FlowKey, Nat] | None:
        """The flow in the body of a message of a dump; None: let the general parser say."""
        if len(body) < _LISTED_FIELDS.size:
            return None
        bits = int.from_bytes(body[: _LISTED_FIELDS.size], "big")
        for mask, networks in self._listed.items():
            network = networks.get(bits & mask)
            if network is not None:
                fields = _LISTED_FIELDS.unpack_from(body)
                client, remote, protocol, port, remote_port, nat, nat_port = fields
                if nat == client and nat_port == port:
                    return None
                key = client + remote + protocol + port + remote_port
                return network, FlowKey(key), Nat(nat + nat_port + _TAILS[False][0])
        return None

    def read(
        self,
        buffer: bytearray,
        lengths: Sequence[int],
        changes: Mapping[NetworkName, Changes],
        read_other: Callable[[bytes], None],
    ) -> None:
        """Note in `changes` what the datagrams say, in their order.

        `read_other` gets each that has another layout, when it is its turn. What isn't translated
        says nothing.
        """
        to_number, known = int.from_bytes, self._known.items()
        used = memoryview(buffer)[: len(lengths) * self._size]
        datagrams = zip(count(), lengths, self._compared(used), self._fields(used), strict=False)
        for number, length, (compared,), fields in datagrams:
            said, client, remote, protocol, port, remote_port, nat, nat_port, status = fields
            bits = to_number(compared, "big")
            for mask, kinds in known:
                kind = kinds.get(bits & mask)
                if kind is not None:
                    break
            else:
                kind = None
            if kind is None or said != length:
                start = number * self._size
                read_other(bytes(used[start : start + length]))
            elif nat != client or nat_port != port:
                network, ended, tails = kind
                changes[network][client + remote + protocol + port + remote_port] = (
                    None if ended else nat + nat_port + tails[status]
                )
