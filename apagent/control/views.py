"""What the management service shows, as plain data; control.proto says what each field means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class NetworkView:
    """A configured network."""

    name: str
    client_interface: str
    prefix: str
    gateway: str
    vni: int
    uplink: str
    nat: str


@dataclass(frozen=True, slots=True)
class AnchorView:
    """The agent's AP as an anchor of one network."""

    network: str
    mode: str
    trouble: str
    translates_to: str
    holds: tuple[str, ...]
    flows: int
    deputy: str


@dataclass(frozen=True, slots=True)
class StatusView:
    """The agent as a whole."""

    ap: str
    version: str
    in_sync: bool
    degraded: tuple[str, ...]
    uptime_s: float
    own_sessions: int
    peer_sessions: int
    clients_here: int
    clients_elsewhere: int
    clock: int
    tunnel_mtu: int
    tcp_mss: int
    leaked_packets: int
    reset_packets: int
    resyncs: int
    networks: tuple[NetworkView, ...]
    sysctls: tuple[str, ...]
    tunnel_address: str
    repairs: int
    checksum: str
    anchors: tuple[AnchorView, ...] = ()


@dataclass(frozen=True, slots=True)
class PeerView:
    """A peer, and how its feed goes."""

    id: str
    address: str
    underlay: str
    state: str
    reason: str
    sessions: int
    clients: int
    epoch: int
    sequence: int
    refused: int
    snapshots: int
    deltas: int
    tunnel_address: str
    checksum: str
    protocol_version: int
    differences: int
    changes_received: int
    tunnel: str = "alive"
    mode: str = "active"
    holds: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RoamView:
    """A client's move, as this agent saw it."""

    from_ap: str
    to_ap: str
    generation: int
    source: str
    time: float
    flows_kept: int


@dataclass(frozen=True, slots=True)
class ClientView:
    """A client, wherever it is."""

    network: str
    mac: str
    addresses: tuple[str, ...]
    serving_ap: str
    generation: int
    flows_by_anchor: Mapping[str, int]
    since_s: float
    roams: tuple[RoamView, ...] = ()


@dataclass(frozen=True, slots=True)
class FlowView:
    """A session with its client."""

    network: str
    protocol: str
    client: str
    client_port: int
    remote: str
    remote_port: int
    anchor: str
    nat_address: str
    nat_port: int
    client_mac: str
    serving_ap: str


@dataclass(frozen=True, slots=True)
class AgentEventView:
    """Something that happened, for a person (`text`) and in parts (`fields`)."""

    time: float
    kind: str
    text: str
    fields: Mapping[str, str] = field(default_factory=dict)
