"""NAT addresses that may move from AP to AP: a /32 each on the uplink of its network.

What is ours is told from the operator's addresses by its route metric, which no route uses: a /32
has none but its local one, without a metric (fib_add_ifaddr(), net/ipv4/fib_frontend.c). It holds a
tag and the network's VNI, since another network may have the same uplink (Linux 4.18). A /32 also
shares its subnet with no other address, so that none goes when ours is deleted
(promote_secondaries).
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator, Mapping
from ipaddress import IPv4Address

from apagent.core.domain import Domain, Network
from apagent.core.model import NetworkName
from apagent.kernel import links
from apagent.kernel.links import Address
from apagent.kernel.port import Change, NetworkDelta
from apagent.kernel.wire import Message, Netlink

_TAG = 0x61000000
"""Above the 24 bits of a VNI."""
_VNI = 0x00FFFFFF
_LENGTH = 32
_HARMLESS = frozenset({errno.EEXIST, errno.EADDRNOTAVAIL})
"""There already (perhaps as the operator's), or gone already."""


def read_addresses(netlink: Netlink, domain: Domain) -> dict[NetworkName, dict[IPv4Address, bool]]:
    """The NAT addresses of ours on each network's uplink. Raises KernelFault."""
    held: dict[NetworkName, dict[IPv4Address, bool]] = {n.name: {} for n in domain.networks}
    places = {place: network for network in domain.networks if (place := _place(network))}
    for address in _own(netlink):
        network = places.get((address.ifindex, address.metric))
        if network is not None:
            held[network.name][address.local] = True
    return held


def install(netlink: Netlink, domain: Domain, deltas: Mapping[NetworkName, NetworkDelta]) -> None:
    """Add the addresses that are new, where the uplink is there. Raises KernelFault."""
    changes = _changes(domain, deltas)
    netlink.request(
        (links.add_address(address, uplink) for address, uplink, added in changes if added),
        ignore=_HARMLESS,
    )


def delete(netlink: Netlink, domain: Domain, deltas: Mapping[NetworkName, NetworkDelta]) -> None:
    """Delete those that we no longer hold. Raises KernelFault."""
    changes = _changes(domain, deltas)
    netlink.request(
        (links.delete_address(address, uplink) for address, uplink, added in changes if not added),
        ignore=_HARMLESS,
    )


def delete_strays(netlink: Netlink, domain: Domain) -> None:
    """Delete what an earlier run left for a network that isn't here any more, or elsewhere.

    Raises KernelFault.
    """
    places = {_place(network) for network in domain.networks}
    strays = [a for a in _own(netlink) if (a.ifindex, a.metric) not in places]
    netlink.request((_deletion(address) for address in strays), ignore=_HARMLESS)


def remove_addresses(netlink: Netlink, domain: Domain) -> list[str]:
    """Delete every NAT address of ours; a line each. Raises KernelFault."""
    metrics = {_metric(network) for network in domain.networks}
    own = [address for address in _own(netlink) if address.metric in metrics]
    netlink.request((_deletion(address) for address in own), ignore=_HARMLESS)
    return [f"address {address.local} on {interface_of(address)}" for address in own]


def _changes(
    domain: Domain, deltas: Mapping[NetworkName, NetworkDelta]
) -> list[tuple[Address, str, bool]]:
    """Each address, its uplink, and whether it is added. An uplink that is gone holds nothing."""
    return [
        (Address(place[0], address, _LENGTH, place[1]), network.uplink, change.new is not None)
        for network, changes in _by_network(domain, deltas)
        if (place := _place(network)) is not None
        for address, change in changes.items()
    ]


def _by_network(
    domain: Domain, deltas: Mapping[NetworkName, NetworkDelta]
) -> Iterator[tuple[Network, Mapping[IPv4Address, Change[bool]]]]:
    for name, delta in deltas.items():
        if delta.addresses:
            yield domain.network_by_name[name], delta.addresses


def _own(netlink: Netlink) -> list[Address]:
    return [address for address in links.addresses(netlink) if is_ours(address)]


def is_ours(address: Address) -> bool:
    """Whether an agent has added it."""
    return address.metric & ~_VNI == _TAG and address.length == _LENGTH


def _deletion(address: Address) -> Message:
    return links.delete_address(address, interface_of(address))


def interface_of(address: Address) -> str:
    """The interface that has it."""
    try:
        return socket.if_indextoname(address.ifindex)
    except OSError:
        return f"interface {address.ifindex}"


def _metric(network: Network) -> int:
    return _TAG | network.vni


def _place(network: Network) -> tuple[int, int] | None:
    """Index of the uplink and metric; None: the uplink is gone, or the network has no takeover."""
    if not network.takeover:
        return None
    try:
        return socket.if_nametoindex(network.uplink), _metric(network)
    except OSError:
        return None
