from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Status(_message.Message):
    __slots__ = ("ap", "version", "in_sync", "degraded", "uptime_s", "own_sessions", "peer_sessions", "clients_here", "clients_elsewhere", "clock", "tunnel_mtu", "tcp_mss", "leaked_packets", "reset_packets", "resyncs", "networks", "sysctls", "tunnel_address", "repairs", "anchors", "checksum")
    AP_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    IN_SYNC_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    OWN_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    PEER_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_HERE_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_ELSEWHERE_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    TUNNEL_MTU_FIELD_NUMBER: _ClassVar[int]
    TCP_MSS_FIELD_NUMBER: _ClassVar[int]
    LEAKED_PACKETS_FIELD_NUMBER: _ClassVar[int]
    RESET_PACKETS_FIELD_NUMBER: _ClassVar[int]
    RESYNCS_FIELD_NUMBER: _ClassVar[int]
    NETWORKS_FIELD_NUMBER: _ClassVar[int]
    SYSCTLS_FIELD_NUMBER: _ClassVar[int]
    TUNNEL_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    REPAIRS_FIELD_NUMBER: _ClassVar[int]
    ANCHORS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    ap: str
    version: str
    in_sync: bool
    degraded: _containers.RepeatedScalarFieldContainer[str]
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
    networks: _containers.RepeatedCompositeFieldContainer[NetworkStatus]
    sysctls: _containers.RepeatedScalarFieldContainer[str]
    tunnel_address: str
    repairs: int
    anchors: _containers.RepeatedCompositeFieldContainer[AnchorStatus]
    checksum: str
    def __init__(self, ap: _Optional[str] = ..., version: _Optional[str] = ..., in_sync: _Optional[bool] = ..., degraded: _Optional[_Iterable[str]] = ..., uptime_s: _Optional[float] = ..., own_sessions: _Optional[int] = ..., peer_sessions: _Optional[int] = ..., clients_here: _Optional[int] = ..., clients_elsewhere: _Optional[int] = ..., clock: _Optional[int] = ..., tunnel_mtu: _Optional[int] = ..., tcp_mss: _Optional[int] = ..., leaked_packets: _Optional[int] = ..., reset_packets: _Optional[int] = ..., resyncs: _Optional[int] = ..., networks: _Optional[_Iterable[_Union[NetworkStatus, _Mapping]]] = ..., sysctls: _Optional[_Iterable[str]] = ..., tunnel_address: _Optional[str] = ..., repairs: _Optional[int] = ..., anchors: _Optional[_Iterable[_Union[AnchorStatus, _Mapping]]] = ..., checksum: _Optional[str] = ...) -> None: ...

class AnchorStatus(_message.Message):
    __slots__ = ("network", "mode", "trouble", "translates_to", "holds", "flows", "deputy")
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    TROUBLE_FIELD_NUMBER: _ClassVar[int]
    TRANSLATES_TO_FIELD_NUMBER: _ClassVar[int]
    HOLDS_FIELD_NUMBER: _ClassVar[int]
    FLOWS_FIELD_NUMBER: _ClassVar[int]
    DEPUTY_FIELD_NUMBER: _ClassVar[int]
    network: str
    mode: str
    trouble: str
    translates_to: str
    holds: _containers.RepeatedScalarFieldContainer[str]
    flows: int
    deputy: str
    def __init__(self, network: _Optional[str] = ..., mode: _Optional[str] = ..., trouble: _Optional[str] = ..., translates_to: _Optional[str] = ..., holds: _Optional[_Iterable[str]] = ..., flows: _Optional[int] = ..., deputy: _Optional[str] = ...) -> None: ...

class SetDrainRequest(_message.Message):
    __slots__ = ("drain", "ap")
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    AP_FIELD_NUMBER: _ClassVar[int]
    drain: bool
    ap: str
    def __init__(self, drain: _Optional[bool] = ..., ap: _Optional[str] = ...) -> None: ...

class ReclaimRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NetworkStatus(_message.Message):
    __slots__ = ("name", "client_interface", "prefix", "gateway", "vni", "uplink", "nat")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CLIENT_INTERFACE_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    VNI_FIELD_NUMBER: _ClassVar[int]
    UPLINK_FIELD_NUMBER: _ClassVar[int]
    NAT_FIELD_NUMBER: _ClassVar[int]
    name: str
    client_interface: str
    prefix: str
    gateway: str
    vni: int
    uplink: str
    nat: str
    def __init__(self, name: _Optional[str] = ..., client_interface: _Optional[str] = ..., prefix: _Optional[str] = ..., gateway: _Optional[str] = ..., vni: _Optional[int] = ..., uplink: _Optional[str] = ..., nat: _Optional[str] = ...) -> None: ...

class ListPeersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListPeersResponse(_message.Message):
    __slots__ = ("peers",)
    PEERS_FIELD_NUMBER: _ClassVar[int]
    peers: _containers.RepeatedCompositeFieldContainer[Peer]
    def __init__(self, peers: _Optional[_Iterable[_Union[Peer, _Mapping]]] = ...) -> None: ...

class Peer(_message.Message):
    __slots__ = ("id", "address", "underlay", "state", "reason", "sessions", "clients", "epoch", "sequence", "refused", "snapshots", "deltas", "tunnel_address", "tunnel", "mode", "holds", "checksum", "protocol_version", "differences", "changes_received")
    ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    UNDERLAY_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    TUNNEL_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TUNNEL_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    HOLDS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCES_FIELD_NUMBER: _ClassVar[int]
    CHANGES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
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
    tunnel: str
    mode: str
    holds: _containers.RepeatedScalarFieldContainer[str]
    checksum: str
    protocol_version: int
    differences: int
    changes_received: int
    def __init__(self, id: _Optional[str] = ..., address: _Optional[str] = ..., underlay: _Optional[str] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., sessions: _Optional[int] = ..., clients: _Optional[int] = ..., epoch: _Optional[int] = ..., sequence: _Optional[int] = ..., refused: _Optional[int] = ..., snapshots: _Optional[int] = ..., deltas: _Optional[int] = ..., tunnel_address: _Optional[str] = ..., tunnel: _Optional[str] = ..., mode: _Optional[str] = ..., holds: _Optional[_Iterable[str]] = ..., checksum: _Optional[str] = ..., protocol_version: _Optional[int] = ..., differences: _Optional[int] = ..., changes_received: _Optional[int] = ...) -> None: ...

class ListClientsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListClientsResponse(_message.Message):
    __slots__ = ("clients",)
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    clients: _containers.RepeatedCompositeFieldContainer[Client]
    def __init__(self, clients: _Optional[_Iterable[_Union[Client, _Mapping]]] = ...) -> None: ...

class Client(_message.Message):
    __slots__ = ("network", "mac", "addresses", "serving_ap", "generation", "flows_by_anchor", "since_s", "roams")
    class FlowsByAnchorEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    MAC_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    SERVING_AP_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    FLOWS_BY_ANCHOR_FIELD_NUMBER: _ClassVar[int]
    SINCE_S_FIELD_NUMBER: _ClassVar[int]
    ROAMS_FIELD_NUMBER: _ClassVar[int]
    network: str
    mac: str
    addresses: _containers.RepeatedScalarFieldContainer[str]
    serving_ap: str
    generation: int
    flows_by_anchor: _containers.ScalarMap[str, int]
    since_s: float
    roams: _containers.RepeatedCompositeFieldContainer[Roam]
    def __init__(self, network: _Optional[str] = ..., mac: _Optional[str] = ..., addresses: _Optional[_Iterable[str]] = ..., serving_ap: _Optional[str] = ..., generation: _Optional[int] = ..., flows_by_anchor: _Optional[_Mapping[str, int]] = ..., since_s: _Optional[float] = ..., roams: _Optional[_Iterable[_Union[Roam, _Mapping]]] = ...) -> None: ...

class Roam(_message.Message):
    __slots__ = ("from_ap", "to_ap", "generation", "source", "time", "flows_kept")
    FROM_AP_FIELD_NUMBER: _ClassVar[int]
    TO_AP_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    FLOWS_KEPT_FIELD_NUMBER: _ClassVar[int]
    from_ap: str
    to_ap: str
    generation: int
    source: str
    time: float
    flows_kept: int
    def __init__(self, from_ap: _Optional[str] = ..., to_ap: _Optional[str] = ..., generation: _Optional[int] = ..., source: _Optional[str] = ..., time: _Optional[float] = ..., flows_kept: _Optional[int] = ...) -> None: ...

class GetClientRequest(_message.Message):
    __slots__ = ("client",)
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    client: str
    def __init__(self, client: _Optional[str] = ...) -> None: ...

class ListFlowsRequest(_message.Message):
    __slots__ = ("client", "anchor", "protocol")
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    ANCHOR_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    client: str
    anchor: str
    protocol: str
    def __init__(self, client: _Optional[str] = ..., anchor: _Optional[str] = ..., protocol: _Optional[str] = ...) -> None: ...

class FlowList(_message.Message):
    __slots__ = ("flows",)
    FLOWS_FIELD_NUMBER: _ClassVar[int]
    flows: _containers.RepeatedCompositeFieldContainer[FlowView]
    def __init__(self, flows: _Optional[_Iterable[_Union[FlowView, _Mapping]]] = ...) -> None: ...

class FlowView(_message.Message):
    __slots__ = ("network", "protocol", "client", "client_port", "remote", "remote_port", "anchor", "nat_address", "nat_port", "client_mac", "serving_ap")
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    CLIENT_PORT_FIELD_NUMBER: _ClassVar[int]
    REMOTE_FIELD_NUMBER: _ClassVar[int]
    REMOTE_PORT_FIELD_NUMBER: _ClassVar[int]
    ANCHOR_FIELD_NUMBER: _ClassVar[int]
    NAT_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NAT_PORT_FIELD_NUMBER: _ClassVar[int]
    CLIENT_MAC_FIELD_NUMBER: _ClassVar[int]
    SERVING_AP_FIELD_NUMBER: _ClassVar[int]
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
    def __init__(self, network: _Optional[str] = ..., protocol: _Optional[str] = ..., client: _Optional[str] = ..., client_port: _Optional[int] = ..., remote: _Optional[str] = ..., remote_port: _Optional[int] = ..., anchor: _Optional[str] = ..., nat_address: _Optional[str] = ..., nat_port: _Optional[int] = ..., client_mac: _Optional[str] = ..., serving_ap: _Optional[str] = ...) -> None: ...

class AssociateRequest(_message.Message):
    __slots__ = ("mac", "address", "network")
    MAC_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    mac: str
    address: str
    network: str
    def __init__(self, mac: _Optional[str] = ..., address: _Optional[str] = ..., network: _Optional[str] = ...) -> None: ...

class WatchEventsRequest(_message.Message):
    __slots__ = ("flows",)
    FLOWS_FIELD_NUMBER: _ClassVar[int]
    flows: bool
    def __init__(self, flows: _Optional[bool] = ...) -> None: ...

class AgentEvent(_message.Message):
    __slots__ = ("time", "kind", "text", "fields")
    class FieldsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    TIME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    time: float
    kind: str
    text: str
    fields: _containers.ScalarMap[str, str]
    def __init__(self, time: _Optional[float] = ..., kind: _Optional[str] = ..., text: _Optional[str] = ..., fields: _Optional[_Mapping[str, str]] = ...) -> None: ...
