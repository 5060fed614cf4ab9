"""The sets and maps of our table: what they are called, and what their keys and values are."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

from apagent.core.domain import ANCHOR_TAG, Domain
from apagent.core.model import ApId, NetworkName
from apagent.core.roam import STRAGGLER_S
from apagent.kernel.nft.elements import (
    CLIENT_SIZE,
    ECHO_SIZE,
    FLOW_SIZE,
    SOCKET_SIZE,
    TARGET_SIZE,
)
from apagent.kernel.nft.messages import (
    SET_FLAG_DYNAMIC,
    SET_FLAG_TIMEOUT,
    VERDICT,
    SetDefinition,
)
from apagent.kernel.nft.userdata import ByteOrder, byte_orders, echo_map

ANCHOR_CHAIN = "anchor_"
ANY_VALUE = ANCHOR_TAG | 0xFFFF
"""What a client's packet carries that no map knows, in place of an anchor's value."""
UNSYNCED = "unsynced"
"""The set of client interfaces that hold back what could belong to a peer's flow."""
ARRIVAL_GRACE_MS = 500
"""How long the sessions of a client that has just arrived may be on their way."""

LEARNED, SETTLED, LEFT = "learned", "settled", "left"
"""What the kernel has learned of clients' places from their packets; the addresses of whose places
the claims have spoken since; those of clients that have just left. Of all networks without a zone:
their addresses are no others'."""
SENDERS, WAYS = "senders", "ways"
"""Verdict maps: what to learn from a packet by its tunnel MAC; what to do with one to a client, by
the place that was learned."""
HERE = 0
"""The number of the place that is here; the others are the peers' numbers."""
LEARNED_MS = 300
"""How long a place that was learned counts without another packet: far longer than claims take, and
a brief detour if it was wrong."""
_MAX_LEARNED = 65535

_IPV4_ADDR, _INTEGER, _INET_PROTO, _INET_SERVICE, _CLASSID = 7, 4, 12, 13, 23
_ETHER_ADDR, _IFNAME = 9, 41
_IFNAME_SIZE = 16
"""nft's data types (nftables, include/datatype.h)."""
_VERDICT_LENGTH = 16
_BITS_PER_TYPE = 6

_U32 = struct.Struct("=I")


@dataclass(frozen=True, slots=True)
class Names:
    """What a network's sets, maps and chains are called."""

    flows: str
    echoes: str
    sockets: str
    known: str
    home: str
    elsewhere: str
    places: str
    arrived: str
    anchors: str
    new_anchor: str
    sources: str
    forwards: str
    new: str
    from_client: str
    inside: str
    icmp: str
    unknown: str
    from_tunnel: str
    sender: str
    stray: str
    own_error: str

    @classmethod
    def of(cls, network: NetworkName) -> Names:
        """The names for `network`."""
        fields = cls.__slots__
        return cls(*(f"{network}_{field}" for field in fields))


def anchor_chain(ap: ApId) -> str:
    """The chain that sends a packet to the anchor `ap`."""
    return ANCHOR_CHAIN + ap


def anchor_value(number: int) -> bytes:
    """An anchor's value in the maps: an skb priority, in host order."""
    return _U32.pack(ANCHOR_TAG | number)


def any_anchor() -> bytes:
    """The key of packets that no map knows, in the verdict maps."""
    return _U32.pack(ANY_VALUE)


def anchor_number(value: bytes) -> int | None:
    """The number in an anchor's value; None: the value isn't one of ours."""
    if len(value) != _U32.size:
        return None
    number: int = _U32.unpack(value)[0] ^ ANCHOR_TAG
    return number if number <= 0xFFFF else None


def definitions(domain: Domain) -> dict[str, SetDefinition]:
    """Every set and map of the table, by name."""
    unsynced = _expiring(UNSYNCED, _IFNAME, _IFNAME_SIZE, round(domain.sync_timeout_s * 1000))
    found = [unsynced, *_learning()]
    for network in domain.networks:
        names = Names.of(network.name)
        found += _definitions(names)
        if network.takeover:
            found.append(_sources(names.sources))
        if network.lets_forwards_move:
            found.append(_forwards(names.forwards))
    return {definition.name: definition for definition in found}


def _concatenation(*types: int) -> int:
    result = 0
    for type_ in types:
        result = result << _BITS_PER_TYPE | type_
    return result


_FLOW_TYPE = _concatenation(_IPV4_ADDR, _IPV4_ADDR, _INET_PROTO, _INET_SERVICE, _INET_SERVICE)
_ECHO_TYPE = _concatenation(_IPV4_ADDR, _IPV4_ADDR, _INTEGER)
_SOCKET_TYPE = _concatenation(_IPV4_ADDR, _INET_PROTO, _INET_SERVICE)
_CLIENT_TYPE = _concatenation(_IPV4_ADDR, _ETHER_ADDR)
_TARGET_TYPE = _concatenation(_IPV4_ADDR, _INET_SERVICE)
_ADDRESS_SIZE, _ETHER_SIZE = 4, 6


def _expiring(name: str, type_: int, size: int, timeout_ms: int) -> SetDefinition:
    """A set whose elements live for `timeout_ms`."""
    order = byte_orders(ByteOrder.HOST if type_ == _IFNAME else ByteOrder.NETWORK)
    return SetDefinition(
        name, type_, size, userdata=order, extra_flags=SET_FLAG_TIMEOUT, timeout_ms=timeout_ms
    )


def _learning() -> tuple[SetDefinition, ...]:
    """What the packet path changes is dynamic; where it adds, the size is limited."""
    return (
        SetDefinition(
            LEARNED,
            _IPV4_ADDR,
            _ADDRESS_SIZE,
            _CLASSID,
            4,
            byte_orders(ByteOrder.NETWORK, ByteOrder.HOST),
            extra_flags=SET_FLAG_TIMEOUT | SET_FLAG_DYNAMIC,
            timeout_ms=LEARNED_MS,
            size=_MAX_LEARNED,
        ),
        replace(
            _expiring(SETTLED, _IPV4_ADDR, _ADDRESS_SIZE, LEARNED_MS),
            extra_flags=SET_FLAG_TIMEOUT | SET_FLAG_DYNAMIC,
        ),
        _expiring(LEFT, _IPV4_ADDR, _ADDRESS_SIZE, round(STRAGGLER_S * 1000)),
        SetDefinition(
            SENDERS,
            _ETHER_ADDR,
            _ETHER_SIZE,
            VERDICT,
            _VERDICT_LENGTH,
            byte_orders(ByteOrder.NETWORK, ByteOrder.MIXED),
        ),
        SetDefinition(
            WAYS,
            _CLASSID,
            4,
            VERDICT,
            _VERDICT_LENGTH,
            byte_orders(ByteOrder.HOST, ByteOrder.MIXED),
        ),
    )


def _definitions(names: Names) -> tuple[SetDefinition, ...]:
    anchor_map = byte_orders(ByteOrder.MIXED, ByteOrder.HOST)
    return (
        SetDefinition(names.flows, _FLOW_TYPE, FLOW_SIZE, _CLASSID, 4, anchor_map),
        SetDefinition(names.echoes, _ECHO_TYPE, ECHO_SIZE, _CLASSID, 4, echo_map()),
        SetDefinition(names.sockets, _SOCKET_TYPE, SOCKET_SIZE, _CLASSID, 4, anchor_map),
        *(
            SetDefinition(pairs, _CLIENT_TYPE, CLIENT_SIZE, userdata=byte_orders(ByteOrder.MIXED))
            for pairs in (names.known, names.home, names.elsewhere, names.places)
        ),
        _expiring(names.arrived, _IPV4_ADDR, _ADDRESS_SIZE, ARRIVAL_GRACE_MS),
        _verdicts(names.anchors),
        _verdicts(names.new_anchor),
    )


def _sources(name: str) -> SetDefinition:
    """A map from uplinks to what new flows are translated to."""
    order = byte_orders(ByteOrder.HOST, ByteOrder.NETWORK)
    return SetDefinition(name, _IFNAME, _IFNAME_SIZE, _IPV4_ADDR, _ADDRESS_SIZE, order)


def _forwards(name: str) -> SetDefinition:
    """A map from NAT sockets to the clients' sockets that they are forwarded to."""
    order = byte_orders(ByteOrder.MIXED, ByteOrder.MIXED)
    return SetDefinition(name, _SOCKET_TYPE, SOCKET_SIZE, _TARGET_TYPE, TARGET_SIZE, order)


def _verdicts(name: str) -> SetDefinition:
    """A map from anchors' values to chains."""
    order = byte_orders(ByteOrder.HOST, ByteOrder.MIXED)
    return SetDefinition(name, _CLASSID, 4, VERDICT, _VERDICT_LENGTH, order)
