"""What happened, in the past tense: the only input of the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import IPv4Address

from apagent.core.model import (
    AnchorStatement,
    ApId,
    Claim,
    FlowKey,
    Mac,
    NatAddress,
    NetworkName,
    SessionChanges,
    Sessions,
    SocketKey,
)


class Source(StrEnum):
    """Who says where a client is."""

    FDB = "fdb"
    """The bridge learned the client's MAC on one of its ports."""
    NEIGHBOUR = "neighbour"
    """The kernel resolved an address to the client's MAC on the client interface."""
    DATA = "data"
    """A packet came in from a client that another AP claims."""
    MANAGEMENT = "management"
    """The operator said so."""


@dataclass(frozen=True, slots=True)
class FlowsChanged:
    """The kernel opened or closed translated flows of ours: one batch, net effect."""

    network: NetworkName
    changes: SessionChanges


@dataclass(frozen=True, slots=True)
class FlowsListed:
    """The whole conntrack table was read: these are all the flows that we translate."""

    tables: Mapping[NetworkName, Sessions]


@dataclass(frozen=True, slots=True)
class ClientSeen:
    """A client was seen on our client interface.

    `address` is its address where the source knows it.
    """

    network: NetworkName
    mac: Mac
    source: Source
    address: IPv4Address | None = None


@dataclass(frozen=True, slots=True)
class ClientAged:
    """The bridge forgot a client that was silent for its ageing time."""

    network: NetworkName
    mac: Mac


@dataclass(frozen=True, slots=True)
class ClientsFound:
    """What bridge and neighbour table hold at our start: clients that were here and maybe are."""

    network: NetworkName
    clients: Mapping[Mac, frozenset[IPv4Address]]


@dataclass(frozen=True, slots=True)
class KernelAdopted:
    """An earlier run of this agent left this forwarding state, which is in use."""

    network: NetworkName
    flows: Mapping[FlowKey, ApId]
    routes: Mapping[IPv4Address, ApId]
    neighbours: Mapping[IPv4Address, Mac]
    addresses: frozenset[IPv4Address] = frozenset()
    """NAT addresses that we hold."""
    sockets: Mapping[SocketKey, ApId] = field(default_factory=dict)
    elsewhere: Mapping[IPv4Address, Mac] = field(default_factory=dict)
    """The clients that the routes lead to."""
    forwards: Mapping[SocketKey, SocketKey] = field(default_factory=dict)
    """Port forwards of NAT addresses that move."""


@dataclass(frozen=True, slots=True)
class PeerConnected:
    """The peer's feed is open; its snapshot or deltas follow."""

    peer: ApId


@dataclass(frozen=True, slots=True)
class PeerDisconnected:
    """The peer's feed broke. Its kernel may well go on forwarding, so its sessions stay."""

    peer: ApId
    reason: str


@dataclass(frozen=True, slots=True)
class PeerSnapshot:
    """All that the peer's feed holds: what is not in here, the peer doesn't say (any more)."""

    peer: ApId
    clock: int
    tables: Mapping[NetworkName, Sessions] | None = field(default_factory=dict)
    """None: by the parts that came before, the tables are right."""
    claims: tuple[Claim, ...] = ()
    anchor: AnchorStatement | None = None
    """None: the peer makes no such statements (version 1 of the feed)."""


@dataclass(frozen=True, slots=True)
class PeerPart:
    """Some sessions from a snapshot of the peer's feed, whose rest is still on its way.

    They hold at once. Whether that is all shows when the `PeerSnapshot` follows.
    """

    peer: ApId
    tables: Mapping[NetworkName, SessionChanges] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PeerDelta:
    """What changed in the peer's feed since the last message."""

    peer: ApId
    clock: int
    tables: Mapping[NetworkName, SessionChanges] = field(default_factory=dict)
    claims: tuple[Claim, ...] = ()
    anchor: AnchorStatement | None = None
    """None: as before."""


@dataclass(frozen=True, slots=True)
class SyncTimedOut:
    """The time to wait for silent peers after a start is over."""


@dataclass(frozen=True, slots=True)
class ProbesAnswered:
    """A round of probes is over: the peers whose kernels answered through the tunnel.

    `uplinks` says of each network's uplink why it leads nowhere; empty: it works.
    """

    answered: frozenset[ApId]
    uplinks: Mapping[NetworkName, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AddressProbed:
    """We have asked on the uplink's segment who uses a NAT address (RFC 5227, section 2.1.1)."""

    nat: NatAddress
    used_by: Mac | None
    """None: nobody answered."""


@dataclass(frozen=True, slots=True)
class AddressConflict:
    """Another machine on the uplink's segment uses a NAT address that we hold."""

    nat: NatAddress
    mac: Mac


@dataclass(frozen=True, slots=True)
class FlowsAdopted:
    """These flows of another anchor are in our conntrack table, with their translation."""

    nat: NatAddress
    sessions: Sessions
    left_out: frozenset[FlowKey] = frozenset()
    """All but these: another flow of ours has their translation."""


@dataclass(frozen=True, slots=True)
class AdoptionFailed:
    """The kernel refused to take another anchor's flows over."""

    nat: NatAddress
    reason: str


@dataclass(frozen=True, slots=True)
class DrainRequested:
    """The operator wants this AP to anchor nothing (or, `drain` False, to anchor again)."""

    drain: bool


@dataclass(frozen=True, slots=True)
class ReclaimRequested:
    """The operator wants this AP's NAT addresses back from whoever has taken them over."""


AnchorEvent = (
    ProbesAnswered
    | AddressProbed
    | AddressConflict
    | FlowsAdopted
    | AdoptionFailed
    | DrainRequested
    | ReclaimRequested
)

Event = (
    FlowsChanged
    | FlowsListed
    | ClientSeen
    | ClientAged
    | ClientsFound
    | KernelAdopted
    | PeerConnected
    | PeerDisconnected
    | PeerPart
    | PeerSnapshot
    | PeerDelta
    | SyncTimedOut
    | AnchorEvent
)
