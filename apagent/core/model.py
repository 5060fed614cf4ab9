"""The words of the domain: flows, sessions, clients, claims.

Flows are many (a million on a busy roam domain), so a flow's identity is a packed key of 13 bytes
and its translation one of 6; `Flow` and `Translation` are their readable forms. Clients are few
and are plain objects.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address
from typing import NamedTuple, NewType

ApId = NewType("ApId", str)
"""Name of an access point, unique in its roam domain."""

Mac = NewType("Mac", str)
"""Link-layer address, six lower-case pairs joined by colons."""

NetworkName = NewType("NetworkName", str)

FlowKey = NewType("FlowKey", bytes)
"""A flow as the client sends it: client, remote, protocol, client port, remote port (13 bytes).

For an ICMP echo the client port is the identifier and the remote port is 0 (RFC 792).
"""

Nat = NewType("Nat", bytes)
"""What the anchor made of the client's address and port, since when, and how far it is (11 bytes).

"When" is the generation of the client's claim at the time, which orders two anchors of one flow.
"How far" is a byte of flags: `ESTABLISHED`, or 0.
"""

SocketKey = NewType("SocketKey", bytes)
"""A client's socket: address, protocol, port (7 bytes). See RFC 4787, section 4.1.

So is the end of a port forward that the outside sees: NAT address, protocol, port.
"""

ICMP, TCP, UDP = 1, 6, 17
PROTOCOL_NAMES = {ICMP: "icmp", TCP: "tcp", UDP: "udp"}
PROTOCOL_NUMBERS = {name: number for number, name in PROTOCOL_NAMES.items()}

_FLOW = struct.Struct(">IIBHH")
_NAT = struct.Struct(">IHIB")
ANY_REMOTE = bytes(4)
"""The remote of a standing session."""
TRANSLATION = slice(0, 6)
"""Address and port in a `Nat`."""
NAT_ADDRESS = slice(0, 4)
"""The address in a `Nat`."""
GENERATION = slice(6, 10)
"""The generation in a `Nat`: in network order, so that bytes compare like numbers."""
STATE = 10
"""Where the flags stand in a `Nat`."""
ESTABLISHED = 0x01
"""Packets have been seen in both directions (conntrack's ASSURED, IPS_ASSURED_BIT in
linux/netfilter/nf_conntrack_common.h). Kept up to date for networks with takeover only."""
NAT_PARTS = struct.Struct(">6sI1s")
"""A `Nat` in three: translation, generation as a number, flags. For what goes through many."""
MAX_GENERATION = 0xFFFFFFFF
PROTOCOL_OFFSET = 8
"""Where the protocol stands in a `FlowKey`."""
UNKNOWN_NAT = Nat(bytes(11))
"""Translation of an adopted session until its anchor tells it; it is as old as can be."""


class Flow(NamedTuple):
    """The readable form of a `FlowKey`."""

    protocol: int
    client: IPv4Address
    client_port: int
    remote: IPv4Address
    remote_port: int

    @property
    def key(self) -> FlowKey:
        """The packed form."""
        return FlowKey(
            _FLOW.pack(
                int(self.client),
                int(self.remote),
                self.protocol,
                self.client_port,
                self.remote_port,
            )
        )

    @classmethod
    def of(cls, key: FlowKey) -> Flow:
        """Unpack `key`."""
        client, remote, protocol, client_port, remote_port = _FLOW.unpack(key)
        return cls(protocol, IPv4Address(client), client_port, IPv4Address(remote), remote_port)

    def __str__(self) -> str:
        name = PROTOCOL_NAMES.get(self.protocol, str(self.protocol))
        if self.protocol == ICMP:
            return f"{name} {self.client} > {self.remote} id {self.client_port}"
        return f"{name} {self.client}:{self.client_port} > {self.remote}:{self.remote_port}"


class Translation(NamedTuple):
    """The readable form of a `Nat`: the address and port that the server sees.

    `generation` is that of the client's claim when the flow was opened, at most `MAX_GENERATION`,
    which also stands for "not known": such a session yields to any other anchor's.
    """

    address: IPv4Address
    port: int
    generation: int = 0
    established: bool = False

    @property
    def packed(self) -> Nat:
        """The packed form."""
        flags = ESTABLISHED if self.established else 0
        return Nat(_NAT.pack(int(self.address), self.port, self.generation, flags))

    @classmethod
    def of(cls, nat: Nat) -> Translation:
        """Unpack `nat`."""
        address, port, generation, flags = _NAT.unpack(nat)
        return cls(IPv4Address(address), port, generation, bool(flags & ESTABLISHED))


def client_of(key: FlowKey) -> bytes:
    """The client's address in `key`, 4 bytes in network order."""
    return key[:4]


def is_standing(key: FlowKey) -> bool:
    """Whether `key` stands for all flows of a client's socket: its remote is 0.0.0.0.

    A port forward is such a session. It lives as long as it is configured at its anchor, with
    takeover as long as its anchor holds its NAT address. Its remote port means nothing but that it
    is another one than that of other forwards to the same socket (`core/forwards.py`).
    """
    return key[4:8] == ANY_REMOTE


def stamped(nat: Nat, generation: int) -> Nat:
    """`nat` with another generation."""
    return Nat(nat[TRANSLATION] + packed_generation(generation) + nat[STATE:])


def packed_generation(generation: int) -> bytes:
    """A generation as it stands in a `Nat`."""
    return min(generation, MAX_GENERATION).to_bytes(4, "big")


def advanced(known: Nat, news: Nat) -> Nat:
    """`known` with the flags of `news` added: a flow that is established stays so."""
    return Nat(known[:STATE] + bytes([known[STATE] | news[STATE]]))


def socket_of(key: FlowKey) -> SocketKey:
    """The client's socket in `key`."""
    return SocketKey(key[:4] + key[8:11])


def packed_socket(address: IPv4Address, protocol: int, port: int) -> SocketKey:
    """A socket's packed form."""
    return SocketKey(address.packed + bytes([protocol]) + port.to_bytes(2, "big"))


def standing_of(socket: SocketKey, number: int = 0) -> FlowKey:
    """A standing session of a client's socket; `number` (16 bits) tells it from others."""
    return FlowKey(socket[:4] + ANY_REMOTE + socket[4:] + number.to_bytes(2, "big"))


SessionChanges = Mapping[FlowKey, Nat | None]
"""The net effect of a batch on an uplink session table: a new session, or None: it ended."""

Sessions = Mapping[FlowKey, Nat]
"""A whole uplink session table of one network."""


class Precedence(NamedTuple):
    """What orders claims: the higher one wins, on every AP, in whatever order claims arrive."""

    generation: int
    ap: ApId


@dataclass(frozen=True, slots=True)
class Claim:
    """An AP's statement that it serves a client.

    `addresses` are the client's IPv4 addresses as far as the AP knows. A `released` claim says that
    the client is gone from the domain: nobody serves it. An `outdone` one says that the AP knows of
    a higher claim: it counts for who has not heard that one yet. A `withdrawn` one takes back what
    the AP has said of the client.
    """

    network: NetworkName
    mac: Mac
    ap: ApId
    generation: int
    addresses: frozenset[IPv4Address] = frozenset()
    released: bool = False
    outdone: bool = False
    withdrawn: bool = False

    @property
    def precedence(self) -> Precedence:
        """What orders this claim among others for the same client."""
        return Precedence(self.generation, self.ap)


class AnchorMode(StrEnum):
    """Whether an AP anchors flows, as it says itself."""

    ACTIVE = "active"
    DRAINING = "draining"
    """It anchors no new flows, by the operator's wish; those that it has go on."""
    NO_UPLINK = "no-uplink"
    """Its uplink leads nowhere: it anchors no new flows, and those that it has are dead."""


class NatAddress(NamedTuple):
    """A NAT address that may move from AP to AP with the flows that are translated to it."""

    network: NetworkName
    address: IPv4Address

    def __str__(self) -> str:
        return f"{self.address} ({self.network})"


@dataclass(frozen=True, slots=True)
class Hold:
    """An AP's statement that it holds a NAT address: it has it on its uplink and translates to it.

    The highest (generation, AP id) holds it, as with claims; generation 0 is provisional.
    """

    nat: NatAddress
    generation: int
    offered_to: ApId | None = None
    """The AP that is to take it over from its living holder."""
    successor: ApId | None = None
    """The AP that its holder wants to take it over should it die; None: whoever comes first."""


@dataclass(frozen=True, slots=True)
class NetworkAnchor:
    """An AP as an anchor of one network."""

    network: NetworkName
    mode: AnchorMode = AnchorMode.ACTIVE
    nat: IPv4Address | None = None
    """The NAT address in its configuration, of which it is the home; None: it has none that moves,
    and takes none over."""


@dataclass(frozen=True, slots=True)
class AnchorStatement:
    """What an AP says of itself as an anchor.

    `ready` are the addresses whose flows it has made ready to continue, after they were offered to
    it. `reclaims`: it wants the addresses whose home it is back from whoever holds them. `taking`
    are the addresses whose flows it is putting into its conntrack table for the first time:
    thousands take a while. One that has failed before isn't said, since it may fail for ever.
    """

    networks: tuple[NetworkAnchor, ...] = ()
    holds: tuple[Hold, ...] = ()
    ready: frozenset[NatAddress] = frozenset()
    reclaims: bool = False
    taking: frozenset[NatAddress] = frozenset()
