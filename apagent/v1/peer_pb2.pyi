from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WatchRequest(_message.Message):
    __slots__ = ("subscriber", "epoch", "sequence", "protocol_version", "held")
    SUBSCRIBER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    subscriber: str
    epoch: int
    sequence: int
    protocol_version: int
    held: Digest
    def __init__(self, subscriber: _Optional[str] = ..., epoch: _Optional[int] = ..., sequence: _Optional[int] = ..., protocol_version: _Optional[int] = ..., held: _Optional[_Union[Digest, _Mapping]] = ...) -> None: ...

class Digest(_message.Message):
    __slots__ = ("sessions", "generations")
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    sessions: _containers.RepeatedScalarFieldContainer[int]
    generations: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, sessions: _Optional[_Iterable[int]] = ..., generations: _Optional[_Iterable[int]] = ...) -> None: ...

class FeedMessage(_message.Message):
    __slots__ = ("kind", "epoch", "sequence", "clock", "tables", "claims", "ap", "protocol_version", "follows", "anchor", "differing")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[FeedMessage.Kind]
        KIND_DELTA: _ClassVar[FeedMessage.Kind]
        KIND_SNAPSHOT_PART: _ClassVar[FeedMessage.Kind]
        KIND_SNAPSHOT_END: _ClassVar[FeedMessage.Kind]
        KIND_DIFFERENCE_END: _ClassVar[FeedMessage.Kind]
    KIND_UNSPECIFIED: FeedMessage.Kind
    KIND_DELTA: FeedMessage.Kind
    KIND_SNAPSHOT_PART: FeedMessage.Kind
    KIND_SNAPSHOT_END: FeedMessage.Kind
    KIND_DIFFERENCE_END: FeedMessage.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    CLAIMS_FIELD_NUMBER: _ClassVar[int]
    AP_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    FOLLOWS_FIELD_NUMBER: _ClassVar[int]
    ANCHOR_FIELD_NUMBER: _ClassVar[int]
    DIFFERING_FIELD_NUMBER: _ClassVar[int]
    kind: FeedMessage.Kind
    epoch: int
    sequence: int
    clock: int
    tables: _containers.RepeatedCompositeFieldContainer[TableChanges]
    claims: _containers.RepeatedCompositeFieldContainer[Claim]
    ap: str
    protocol_version: int
    follows: int
    anchor: AnchorStatement
    differing: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, kind: _Optional[_Union[FeedMessage.Kind, str]] = ..., epoch: _Optional[int] = ..., sequence: _Optional[int] = ..., clock: _Optional[int] = ..., tables: _Optional[_Iterable[_Union[TableChanges, _Mapping]]] = ..., claims: _Optional[_Iterable[_Union[Claim, _Mapping]]] = ..., ap: _Optional[str] = ..., protocol_version: _Optional[int] = ..., follows: _Optional[int] = ..., anchor: _Optional[_Union[AnchorStatement, _Mapping]] = ..., differing: _Optional[_Iterable[int]] = ...) -> None: ...

class TableChanges(_message.Message):
    __slots__ = ("network", "opened", "closed", "opened_flows", "opened_nats", "closed_flows")
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    OPENED_FLOWS_FIELD_NUMBER: _ClassVar[int]
    OPENED_NATS_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FLOWS_FIELD_NUMBER: _ClassVar[int]
    network: str
    opened: _containers.RepeatedCompositeFieldContainer[Session]
    closed: _containers.RepeatedCompositeFieldContainer[FlowKey]
    opened_flows: bytes
    opened_nats: bytes
    closed_flows: bytes
    def __init__(self, network: _Optional[str] = ..., opened: _Optional[_Iterable[_Union[Session, _Mapping]]] = ..., closed: _Optional[_Iterable[_Union[FlowKey, _Mapping]]] = ..., opened_flows: _Optional[bytes] = ..., opened_nats: _Optional[bytes] = ..., closed_flows: _Optional[bytes] = ...) -> None: ...

class FlowKey(_message.Message):
    __slots__ = ("client", "remote", "protocol", "client_port", "remote_port")
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    REMOTE_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    CLIENT_PORT_FIELD_NUMBER: _ClassVar[int]
    REMOTE_PORT_FIELD_NUMBER: _ClassVar[int]
    client: int
    remote: int
    protocol: int
    client_port: int
    remote_port: int
    def __init__(self, client: _Optional[int] = ..., remote: _Optional[int] = ..., protocol: _Optional[int] = ..., client_port: _Optional[int] = ..., remote_port: _Optional[int] = ...) -> None: ...

class Session(_message.Message):
    __slots__ = ("flow", "nat_address", "nat_port", "generation", "established")
    FLOW_FIELD_NUMBER: _ClassVar[int]
    NAT_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NAT_PORT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ESTABLISHED_FIELD_NUMBER: _ClassVar[int]
    flow: FlowKey
    nat_address: int
    nat_port: int
    generation: int
    established: bool
    def __init__(self, flow: _Optional[_Union[FlowKey, _Mapping]] = ..., nat_address: _Optional[int] = ..., nat_port: _Optional[int] = ..., generation: _Optional[int] = ..., established: _Optional[bool] = ...) -> None: ...

class AnchorStatement(_message.Message):
    __slots__ = ("networks", "holds", "ready", "reclaims", "taking")
    NETWORKS_FIELD_NUMBER: _ClassVar[int]
    HOLDS_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    RECLAIMS_FIELD_NUMBER: _ClassVar[int]
    TAKING_FIELD_NUMBER: _ClassVar[int]
    networks: _containers.RepeatedCompositeFieldContainer[NetworkAnchor]
    holds: _containers.RepeatedCompositeFieldContainer[Hold]
    ready: _containers.RepeatedCompositeFieldContainer[NatAddress]
    reclaims: bool
    taking: _containers.RepeatedCompositeFieldContainer[NatAddress]
    def __init__(self, networks: _Optional[_Iterable[_Union[NetworkAnchor, _Mapping]]] = ..., holds: _Optional[_Iterable[_Union[Hold, _Mapping]]] = ..., ready: _Optional[_Iterable[_Union[NatAddress, _Mapping]]] = ..., reclaims: _Optional[bool] = ..., taking: _Optional[_Iterable[_Union[NatAddress, _Mapping]]] = ...) -> None: ...

class NetworkAnchor(_message.Message):
    __slots__ = ("network", "mode", "nat")
    class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        MODE_ACTIVE: _ClassVar[NetworkAnchor.Mode]
        MODE_DRAINING: _ClassVar[NetworkAnchor.Mode]
        MODE_NO_UPLINK: _ClassVar[NetworkAnchor.Mode]
    MODE_ACTIVE: NetworkAnchor.Mode
    MODE_DRAINING: NetworkAnchor.Mode
    MODE_NO_UPLINK: NetworkAnchor.Mode
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    NAT_FIELD_NUMBER: _ClassVar[int]
    network: str
    mode: NetworkAnchor.Mode
    nat: int
    def __init__(self, network: _Optional[str] = ..., mode: _Optional[_Union[NetworkAnchor.Mode, str]] = ..., nat: _Optional[int] = ...) -> None: ...

class NatAddress(_message.Message):
    __slots__ = ("network", "address")
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    network: str
    address: int
    def __init__(self, network: _Optional[str] = ..., address: _Optional[int] = ...) -> None: ...

class Hold(_message.Message):
    __slots__ = ("nat", "generation", "offered_to", "successor")
    NAT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    OFFERED_TO_FIELD_NUMBER: _ClassVar[int]
    SUCCESSOR_FIELD_NUMBER: _ClassVar[int]
    nat: NatAddress
    generation: int
    offered_to: str
    successor: str
    def __init__(self, nat: _Optional[_Union[NatAddress, _Mapping]] = ..., generation: _Optional[int] = ..., offered_to: _Optional[str] = ..., successor: _Optional[str] = ...) -> None: ...

class Claim(_message.Message):
    __slots__ = ("network", "mac", "generation", "addresses", "released", "outdone", "withdrawn")
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    MAC_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    OUTDONE_FIELD_NUMBER: _ClassVar[int]
    WITHDRAWN_FIELD_NUMBER: _ClassVar[int]
    network: str
    mac: bytes
    generation: int
    addresses: _containers.RepeatedScalarFieldContainer[int]
    released: bool
    outdone: bool
    withdrawn: bool
    def __init__(self, network: _Optional[str] = ..., mac: _Optional[bytes] = ..., generation: _Optional[int] = ..., addresses: _Optional[_Iterable[int]] = ..., released: _Optional[bool] = ..., outdone: _Optional[bool] = ..., withdrawn: _Optional[bool] = ...) -> None: ...
