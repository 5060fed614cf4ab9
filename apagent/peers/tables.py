"""Session tables in the feed's messages: session by session, or since version 2 in columns.

A column is all flows' keys, or all their translations, one after the other as the core packs them.
So a batch is written by joining, and read by unpacking and a few comparisons: a message object for
each flow would take most of the time that both ends spend on it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from ipaddress import IPv4Address
from typing import NamedTuple

from apagent.core.domain import Network
from apagent.core.model import (
    ESTABLISHED,
    ICMP,
    TCP,
    UDP,
    FlowKey,
    Nat,
    NetworkName,
    SessionChanges,
)
from apagent.errors import PeerFault
from apagent.peers import versions
from apagent.v1 import peer_pb2 as pb

Changes = dict[FlowKey, Nat | None]
Refuse = Callable[[str], None]

_KEY = struct.Struct(">IIBHH")
_NAT = struct.Struct(">IHIB")
"""`FlowKey` and `Nat` as numbers."""
_WHOLE_KEY = struct.Struct("13s")
_KEY_HEAD = struct.Struct(">IIB4x")
"""Client, remote and protocol: what decides whether a peer may say it."""
_WHOLE_NAT = struct.Struct("11s")
_PROTOCOLS = frozenset({ICMP, TCP, UDP})


class Scope(NamedTuple):
    """The addresses that clients of a network may have, as numbers."""

    name: NetworkName
    prefix: int
    mask: int
    reserved: frozenset[int]
    """Inside the prefix, and never a client: the gateway, the network and its broadcast address."""

    @classmethod
    def of(cls, network: Network) -> Scope:
        """The scope of `network`."""
        prefix = network.prefix
        reserved = (network.gateway, prefix.network_address, prefix.broadcast_address)
        return cls(
            network.name,
            int(prefix.network_address),
            int(prefix.netmask),
            frozenset(map(int, reserved)),
        )

    def covers(self, address: int) -> bool:
        """Whether the address is inside the prefix."""
        return address & self.mask == self.prefix

    def holds(self, address: int) -> bool:
        """Whether a client may have the address."""
        return self.covers(address) and address not in self.reserved


def table_message(network: NetworkName, changes: SessionChanges, version: int) -> pb.TableChanges:
    """`changes` for subscribers that speak `version`."""
    if version < versions.WITH_COLUMNS:
        return _one_by_one(network, changes)
    opened = {key: nat for key, nat in changes.items() if nat is not None}
    closed = () if len(opened) == len(changes) else [k for k in changes if k not in opened]
    return pb.TableChanges(
        network=network,
        opened_flows=b"".join(opened),
        opened_nats=b"".join(opened.values()),
        closed_flows=b"".join(closed),
    )


def count_untrusted(table: pb.TableChanges) -> int:
    """How many sessions it speaks of."""
    columns = len(table.opened_flows) + len(table.closed_flows)
    return len(table.opened) + len(table.closed) + columns // _KEY.size


def read_table_untrusted(
    table: pb.TableChanges, scope: Scope, changes: Changes, refuse: Refuse
) -> None:
    """Note in `changes` what the table says; `refuse` gets the reason for each that may not be.

    Raises PeerFault where columns aren't whole.
    """
    _read_closed_untrusted(table.closed, scope, changes, refuse)
    _read_opened_untrusted(table.opened, scope, changes, refuse)
    if table.closed_flows or table.opened_flows or table.opened_nats:
        _read_columns_untrusted(table, scope, changes, refuse)


def _read_columns_untrusted(
    table: pb.TableChanges, scope: Scope, changes: Changes, refuse: Refuse
) -> None:
    opened, nats, closed = table.opened_flows, table.opened_nats, table.closed_flows
    whole = not (len(opened) % _KEY.size or len(closed) % _KEY.size)
    if not whole or len(opened) // _KEY.size * _NAT.size != len(nats):
        raise PeerFault(
            f"columns of {len(opened)}, {len(nats)} and {len(closed)} bytes, "
            f"for flows of {_KEY.size} and translations of {_NAT.size}"
        )
    for key in _keys_untrusted(closed, scope, refuse):
        if key is not None:
            changes[key] = None
    keys = _keys_untrusted(opened, scope, refuse)
    for key, (nat,) in zip(keys, _WHOLE_NAT.iter_unpack(nats), strict=True):
        if key is not None:
            changes[key] = nat if nat[-1] <= ESTABLISHED else _without_unknown_flags(nat)


def _keys_untrusted(column: bytes, scope: Scope, refuse: Refuse) -> Iterator[FlowKey | None]:
    """The keys in a column, None for each that is refused."""
    _, prefix, mask, reserved = scope
    protocols = _PROTOCOLS
    heads = _KEY_HEAD.iter_unpack(column)
    for (key,), (client, remote, protocol) in zip(
        _WHOLE_KEY.iter_unpack(column), heads, strict=True
    ):
        if client & mask != prefix or client in reserved:
            refuse(f"a session of {IPv4Address(client)}, no client of {scope.name}")
            yield None
        elif remote & mask == prefix or protocol not in protocols:
            refuse(f"a session to {IPv4Address(remote)}, protocol {protocol}")
            yield None
        else:
            yield key


def _without_unknown_flags(nat: bytes) -> Nat:
    return Nat(nat[:-1] + bytes([nat[-1] & ESTABLISHED]))


def _read_opened_untrusted(
    opened: Iterable[pb.Session], scope: Scope, changes: Changes, refuse: Refuse
) -> None:
    for session in opened:
        flow = session.flow
        client, remote, protocol = flow.client, flow.remote, flow.protocol
        if not scope.holds(client):
            refuse(f"a session of {IPv4Address(client)}, no client of {scope.name}")
        elif scope.covers(remote) or protocol not in _PROTOCOLS:
            refuse(f"a session to {IPv4Address(remote)}, protocol {protocol}")
        else:
            try:
                key = _KEY.pack(client, remote, protocol, flow.client_port, flow.remote_port)
                nat = _NAT.pack(
                    session.nat_address, session.nat_port, session.generation, session.established
                )
            except struct.error:
                refuse(f"a session of {IPv4Address(client)} with a port beyond 65535")
            else:
                changes[FlowKey(key)] = Nat(nat)


def _read_closed_untrusted(
    closed: Iterable[pb.FlowKey], scope: Scope, changes: Changes, refuse: Refuse
) -> None:
    for flow in closed:
        client = flow.client
        if not scope.holds(client):
            refuse(f"the end of a session of {IPv4Address(client)}, no client here")
            continue
        try:
            key = _KEY.pack(client, flow.remote, flow.protocol, flow.client_port, flow.remote_port)
        except struct.error:
            refuse(f"the end of a session of {IPv4Address(client)} with impossible numbers")
        else:
            changes[FlowKey(key)] = None


def _one_by_one(network: NetworkName, changes: SessionChanges) -> pb.TableChanges:
    table = pb.TableChanges(network=network)
    for key, nat in changes.items():
        if nat is None:
            _fill(table.closed.add(), key)
        else:
            session = table.opened.add()
            session.nat_address, session.nat_port, session.generation, flags = _NAT.unpack(nat)
            session.established = bool(flags & ESTABLISHED)
            _fill(session.flow, key)
    return table


def _fill(flow: pb.FlowKey, key: FlowKey) -> None:
    (
        flow.client,
        flow.remote,
        flow.protocol,
        flow.client_port,
        flow.remote_port,
    ) = _KEY.unpack(key)
