"""The words of the domain: flows, sessions, clients, claims.

Flows are many (a million on a busy roam domain), so a flow's identity is a packed key of 13 bytes
and its translation one of 6; `Flow` and `Translation` are their readable forms. Clients are few
and are plain objects.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
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
"""What the anchor made of the client's address and port (6 bytes)."""

SocketKey = NewType("SocketKey", bytes)
"""A client's UDP socket: client address and port (6 bytes). See RFC 4787, section 4.1."""

ICMP, TCP, UDP = 1, 6, 17
PROTOCOL_NAMES = {ICMP: "icmp", TCP: "tcp", UDP: "udp"}
PROTOCOL_NUMBERS = {name: number for number, name in PROTOCOL_NAMES.items()}

_FLOW = struct.Struct(">IIBHH")
_NAT = struct.Struct(">IH")
FLOW_KEY_SIZE = _FLOW.size
NAT_SIZE = _NAT.size
PROTOCOL_OFFSET = 8
"""Where the protocol stands in a `FlowKey`."""


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
    """The readable form of a `Nat`: the address and port that the server sees."""

    address: IPv4Address
    port: int

    @property
    def packed(self) -> Nat:
        """The packed form."""
        return Nat(_NAT.pack(int(self.address), self.port))

    @classmethod
    def of(cls, nat: Nat) -> Translation:
        """Unpack `nat`."""
        address, port = _NAT.unpack(nat)
        return cls(IPv4Address(address), port)


def client_of(key: FlowKey) -> bytes:
    """The client's address in `key`, 4 bytes in network order."""
    return key[:4]


def socket_of(key: FlowKey) -> SocketKey:
    """The client's socket in `key` (address and port)."""
    return SocketKey(key[:4] + key[9:11])


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
    the client is gone from the domain: nobody serves it.
    """

    network: NetworkName
    mac: Mac
    ap: ApId
    generation: int
    addresses: frozenset[IPv4Address] = frozenset()
    released: bool = False

    @property
    def precedence(self) -> Precedence:
        """What orders this claim among others for the same client."""
        return Precedence(self.generation, self.ap)
