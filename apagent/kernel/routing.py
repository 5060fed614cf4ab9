"""Routes and policy rules: who is reached through which peer's tunnel address.

An anchor's table holds one default route; a network's host table one route a client that another
AP serves. The first network's also holds one to each peer's tunnel address, for what has ours as
its source: answers to probes. They all carry our protocol number and lie in our tables; main is
never touched.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from dataclasses import replace
from ipaddress import IPv4Address

from apagent.core.domain import Ap, Domain, Network
from apagent.core.model import ApId, NetworkName
from apagent.kernel import links
from apagent.kernel.port import Change
from apagent.kernel.rtnetlink import Route, delete_route, interface_index, routes, set_route
from apagent.kernel.tunnel import own_devices
from apagent.kernel.wire import Message, Netlink

_ANYWHERE = IPv4Address(0)


def prepare_routes(netlink: Netlink, domain: Domain) -> None:
    """Install the routes to every peer; remove routes of ours that have lost their meaning.

    Host routes of clients stay where their network and serving AP still exist. Raises KernelFault.
    """
    wanted = {
        _anchor_route(domain, network, peer) for network in domain.networks for peer in domain.peers
    }
    wanted |= {_peer_route(domain, peer) for peer in domain.peers}
    wanted |= set(_connected_routes(domain))
    present = set(_own_routes(netlink, domain))
    netlink.request(set_route(route, f"route {route}") for route in wanted - present)
    keys = {(route.table, route.destination, route.length) for route in wanted}
    hosts = _HostRoutes(domain)
    netlink.request(
        delete_route(route, f"removing stale route {route}")
        for route in present
        if (route.table, route.destination, route.length) not in keys
        and hosts.serving(route) is None
    )


def read_host_routes(
    netlink: Netlink, domain: Domain
) -> dict[NetworkName, dict[IPv4Address, ApId]]:
    """The host routes of each network: client address to serving AP. Raises KernelFault."""
    hosts = _HostRoutes(domain)
    found: dict[NetworkName, dict[IPv4Address, ApId]] = {n.name: {} for n in domain.networks}
    for route in routes(netlink, domain.route_protocol):
        serving = hosts.serving(route)
        if serving is not None:
            network, peer = serving
            found[network][route.destination] = peer
    return found


def host_route_messages(
    domain: Domain, network: Network, changes: Mapping[IPv4Address, Change[ApId]]
) -> list[Message]:
    """Install and remove host routes. Raises KernelFault if the tunnel device is gone."""
    if not changes:
        return []
    oif = _device_index(domain, network)
    return [_host_route_message(domain, network, oif, a, c) for a, c in changes.items()]


def _host_route_message(
    domain: Domain, network: Network, oif: int, address: IPv4Address, change: Change[ApId]
) -> Message:
    table, protocol = domain.host_table(network), domain.route_protocol
    if change.new is None:
        route = Route(table, address, 32, _ANYWHERE, oif, protocol)
        return delete_route(route, f"host route of {address} in table {table}")
    gateway = domain.peer_by_id[change.new].tunnel_address
    route = Route(table, address, 32, gateway, oif, protocol)
    return set_route(route, f"host route {route}")


def remove_routes(netlink: Netlink, domain: Domain) -> list[str]:
    """Remove every route of ours; a line each. Raises KernelFault."""
    present = _own_routes(netlink, domain)
    netlink.request(delete_route(route, f"route {route}") for route in present)
    return [f"route {route}" for route in present]


def _own_routes(netlink: Netlink, domain: Domain) -> list[Route]:
    """Routes with our protocol, in our tables or (tables of other numbers once) on our devices."""
    devices = {link.ifindex for link in own_devices(links.links(netlink).values(), domain)}
    return [
        route
        for route in routes(netlink, domain.route_protocol)
        if route.table in domain.route_tables or route.oif in devices
    ]


def _anchor_route(domain: Domain, network: Network, peer: Ap) -> Route:
    return Route(
        domain.anchor_table(network, peer),
        _ANYWHERE,
        0,
        peer.tunnel_address,
        _device_index(domain, network),
        domain.route_protocol,
    )


def _peer_route(domain: Domain, peer: Ap) -> Route:
    network = domain.networks[0]
    route = _anchor_route(domain, network, peer)
    table = domain.host_table(network)
    return replace(route, table=table, destination=peer.tunnel_address, length=32)


def _connected_routes(domain: Domain) -> Iterator[Route]:
    """The prefixes of networks with a zone: main can't know on which interface each is meant."""
    present = {name: index for index, name in socket.if_nameindex()}
    for network in domain.networks:
        if network.zone and network.client_interface in present:
            yield Route(
                domain.host_table(network),
                network.prefix.network_address,
                network.prefix.prefixlen,
                _ANYWHERE,
                present[network.client_interface],
                domain.route_protocol,
            )


def _device_index(domain: Domain, network: Network) -> int:
    return interface_index(domain.device(network), f"tunnel of network {network.name}")


class _HostRoutes:
    """Tells the host routes that mean something in `domain`."""

    def __init__(self, domain: Domain) -> None:
        self._networks = {domain.host_table(n): n for n in domain.networks}
        self._devices = {n.name: _device_index(domain, n) for n in domain.networks}
        self._peers = {peer.tunnel_address: peer.id for peer in domain.peers}

    def serving(self, route: Route) -> tuple[NetworkName, ApId] | None:
        """The network of a host route and the AP it leads to; None: it isn't one."""
        network = self._networks.get(route.table)
        peer = self._peers.get(route.gateway)
        if network is None or peer is None:
            return None
        if route.length != 32 or route.destination not in network.prefix:
            return None
        if route.oif != self._devices[network.name]:
            return None
        return network.name, peer
