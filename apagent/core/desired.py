"""The dynamic kernel state as plain data: whole, and as a difference.

Installed state is a function of desired state: `wanted` computes it from tables and clients,
`drain_changes` gives what changed since the last call, `difference` what is wrong with a kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Generic, NamedTuple, TypeVar

from apagent.core.clients import ClientTable, Place
from apagent.core.model import ApId, FlowKey, Mac, SocketKey
from apagent.core.session_tables import SessionTables

K = TypeVar("K")
V = TypeVar("V")

NOBODY = ApId("")
"""In `NetworkState.diverted`: packets go to no AP, but on to conntrack here."""
ANY_ANCHOR = ApId("*")
"""In `NetworkState.diverted`: packets that belong to no known flow. No AP has this id."""


class Change(NamedTuple, Generic[V]):
    """One key's value before and after; None: absent. `old` and `new` always differ."""

    old: V | None
    new: V | None


@dataclass(frozen=True, slots=True)
class AnchorState:
    """The part of a `NetworkState` that follows from who anchors and who holds what."""

    diverted: Mapping[ApId, ApId] = field(default_factory=dict)
    addresses: Mapping[IPv4Address, bool] = field(default_factory=dict)
    sources: Mapping[str, IPv4Address] = field(default_factory=dict)
    forwards: Mapping[SocketKey, SocketKey] = field(default_factory=dict)


@dataclass(slots=True)
class NetworkState:
    """The dynamic kernel state of one network."""

    flows: dict[FlowKey, ApId] = field(default_factory=dict)
    """Peers' sessions: flow -> anchor."""
    sockets: dict[SocketKey, ApId] = field(default_factory=dict)
    """Clients' UDP sockets -> the anchor that holds their mapping."""
    known: dict[IPv4Address, Mac] = field(default_factory=dict)
    """The clients that we claim. A packet on the client interface whose addresses are no such pair
    raises a `Source.DATA` event, and what it starts in mid-connection is dropped, not reset."""
    home: dict[IPv4Address, Mac] = field(default_factory=dict)
    """Those of `known` whose packets no map leads anywhere, so that nothing is looked up for them:
    they have no session at another AP, and what they open is anchored here."""
    elsewhere: dict[IPv4Address, Mac] = field(default_factory=dict)
    """The clients that other APs claim. A packet on the client interface whose addresses are such
    a pair proves that the client is here: the kernel believes it before any claim says so."""
    places: dict[IPv4Address, ApId] = field(default_factory=dict)
    """From where a client's packets should come through the tunnel: address -> serving AP. One that
    comes from another AP proves that the client is there now."""
    routes: dict[IPv4Address, ApId] = field(default_factory=dict)
    """Host routes: client address -> serving AP, the same as `places`."""
    neighbours: dict[IPv4Address, Mac] = field(default_factory=dict)
    """Permanent neighbour entries on the client interface: address -> client."""
    diverted: dict[ApId, ApId] = field(default_factory=dict)
    """Anchors whose flows' packets go elsewhere: to another AP, or to `NOBODY`, so that what is in
    mid-connection is reset and the rest is anchored here. `ANY_ANCHOR` -> the AP that anchors our
    clients' new flows in our place. Empty in quiet times: each anchor gets its flows' packets."""
    addresses: dict[IPv4Address, bool] = field(default_factory=dict)
    """NAT addresses that we hold: each a /32 of ours on the uplink (the value is always True)."""
    sources: dict[str, IPv4Address] = field(default_factory=dict)
    """Uplink -> what new flows are translated to in a network with takeover; absent: masquerade."""
    forwards: dict[SocketKey, SocketKey] = field(default_factory=dict)
    """Port forwards in a network with takeover: NAT address, protocol and port -> client's socket.
    Where nothing moves they are static."""


@dataclass(slots=True)
class NetworkDelta:
    """Changes to a `NetworkState`, field by field."""

    flows: dict[FlowKey, Change[ApId]] = field(default_factory=dict)
    sockets: dict[SocketKey, Change[ApId]] = field(default_factory=dict)
    known: dict[IPv4Address, Change[Mac]] = field(default_factory=dict)
    home: dict[IPv4Address, Change[Mac]] = field(default_factory=dict)
    elsewhere: dict[IPv4Address, Change[Mac]] = field(default_factory=dict)
    places: dict[IPv4Address, Change[ApId]] = field(default_factory=dict)
    routes: dict[IPv4Address, Change[ApId]] = field(default_factory=dict)
    neighbours: dict[IPv4Address, Change[Mac]] = field(default_factory=dict)
    diverted: dict[ApId, Change[ApId]] = field(default_factory=dict)
    addresses: dict[IPv4Address, Change[bool]] = field(default_factory=dict)
    sources: dict[str, Change[IPv4Address]] = field(default_factory=dict)
    forwards: dict[SocketKey, Change[SocketKey]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(getattr(self, part) for part in self.__slots__)


def wanted(
    sessions: SessionTables,
    clients: ClientTable,
    anchors: AnchorState,
    *,
    session_maps: bool = True,
) -> NetworkState:
    """What the kernel should hold for a network; flows and sockets only with `session_maps`."""
    places = clients.places()
    return NetworkState(
        flows=sessions.desired_flows() if session_maps else {},
        sockets=sessions.desired_sockets() if session_maps else {},
        known={a: mac for a, place in places.items() if (mac := place.known) is not None},
        home={
            address: mac
            for address, place in places.items()
            if (mac := _home(place, anchors, is_mapped=sessions.is_mapped(address.packed)))
            is not None
        },
        elsewhere={a: mac for a, place in places.items() if (mac := place.elsewhere) is not None},
        places={address: place.ap for address, place in places.items() if place.ap is not None},
        routes={address: place.ap for address, place in places.items() if place.ap is not None},
        neighbours={a: mac for a, place in places.items() if (mac := place.neighbour) is not None},
        diverted=dict(anchors.diverted),
        addresses=dict(anchors.addresses),
        sources=dict(anchors.sources),
        forwards=dict(anchors.forwards),
    )


def drain_changes(
    sessions: SessionTables, clients: ClientTable, before: AnchorState, after: AnchorState
) -> NetworkDelta:
    """What the kernel should change since the last call, at which `before` was the state."""
    delta = NetworkDelta(
        diverted=_differences(before.diverted, after.diverted),
        addresses=_differences(before.addresses, after.addresses),
        sources=_differences(before.sources, after.sources),
        forwards=_differences(before.forwards, after.forwards),
    )
    delta.flows = _changed(sessions.flow_changes())
    delta.sockets = _changed(sessions.socket_changes())
    for address, old in clients.touched.items():
        new = clients.place(address)
        _put(delta.neighbours, address, old.neighbour, new.neighbour)
        _put(delta.routes, address, old.ap, new.ap)
        _put(delta.places, address, old.ap, new.ap)
        _put(delta.elsewhere, address, old.elsewhere, new.elsewhere)
        _put(delta.known, address, old.known, new.known)
    delta.home = _home_changes(sessions, clients, before, after)
    sessions.touched_flows.clear()
    sessions.touched_sockets.clear()
    sessions.touched_clients.clear()
    clients.touched.clear()
    return delta


def _home_changes(
    sessions: SessionTables, clients: ClientTable, before: AnchorState, after: AnchorState
) -> dict[IPv4Address, Change[Mac]]:
    """Whose packets begin or cease to be looked up."""
    addresses = dict.fromkeys((*clients.touched, *map(IPv4Address, sessions.touched_clients)))
    if (ANY_ANCHOR in before.diverted) != (ANY_ANCHOR in after.diverted):
        addresses.update(dict.fromkeys(clients.places()))
    changes: dict[IPv4Address, Change[Mac]] = {}
    for address in addresses:
        new = clients.place(address)
        old = clients.touched.get(address, new)
        is_mapped = sessions.is_mapped(address.packed)
        was_mapped = sessions.touched_clients.get(address.packed, is_mapped)
        was_home = _home(old, before, is_mapped=was_mapped)
        _put(changes, address, was_home, _home(new, after, is_mapped=is_mapped))
    return changes


def _home(place: Place, anchors: AnchorState, *, is_mapped: bool) -> Mac | None:
    """The client, if it is here for certain and no map leads its packets to another AP."""
    return None if is_mapped or ANY_ANCHOR in anchors.diverted else place.known


def _changed(changes: Iterable[tuple[K, V | None, V | None]]) -> dict[K, Change[V]]:
    """There are thousands of flows and few anchors, so that changes are shared."""
    made: dict[tuple[V | None, V | None], Change[V]] = {}
    changed: dict[K, Change[V]] = {}
    for key, old, new in changes:
        change = made.get((old, new))
        if change is None:
            change = made[old, new] = Change(old, new)
        changed[key] = change
    return changed


def difference(actual: NetworkState, should: NetworkState) -> NetworkDelta:
    """The changes that make `actual` into `should`."""
    return NetworkDelta(
        flows=_differences(actual.flows, should.flows),
        sockets=_differences(actual.sockets, should.sockets),
        known=_differences(actual.known, should.known),
        home=_differences(actual.home, should.home),
        elsewhere=_differences(actual.elsewhere, should.elsewhere),
        places=_differences(actual.places, should.places),
        routes=_differences(actual.routes, should.routes),
        neighbours=_differences(actual.neighbours, should.neighbours),
        diverted=_differences(actual.diverted, should.diverted),
        addresses=_differences(actual.addresses, should.addresses),
        sources=_differences(actual.sources, should.sources),
        forwards=_differences(actual.forwards, should.forwards),
    )


def _differences(actual: Mapping[K, V], should: Mapping[K, V]) -> dict[K, Change[V]]:
    changes: dict[K, Change[V]] = {}
    for key, new in should.items():
        _put(changes, key, actual.get(key), new)
    for key, old in actual.items():
        if key not in should:
            changes[key] = Change(old, None)
    return changes


def _put(changes: dict[K, Change[V]], key: K, old: V | None, new: V | None) -> None:
    if old != new:
        changes[key] = Change(old, new)
