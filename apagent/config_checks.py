"""What no key of a configuration shows by itself: whether its parts can work together."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address
from itertools import combinations
from typing import TYPE_CHECKING

from apagent.core.domain import OWN_MARKS, Network, no_host, tunnel_mac
from apagent.errors import ConfigError

if TYPE_CHECKING:  # it calls us
    from apagent.config import Config

_LONGEST_PREFIX = 30
"""A network behind a longer one has no address for a client."""


def check(config: Config) -> None:
    """Raises ConfigError for the first thing that can't work."""
    if not config.networks:
        raise ConfigError("networks: is missing; add at least one [[networks]] table")
    _check_peers(config)
    for i, network in enumerate(config.networks):
        _check_network(f"networks[{i}]", network)
        _check_clients(f"networks[{i}]", network)
    _check_forwards(config)
    _check_successors(config)
    _check_pairs(config)
    _check_between_aps(config)
    _check_nat_addresses(config)


def _check_peers(config: Config) -> None:
    zones = sum(network.zone > 0 for network in config.networks)
    capacity = config.kernel.capacity - OWN_MARKS
    if len(config.peers) + zones > capacity:
        raise ConfigError(
            f"kernel.mark_mask: {config.kernel.mark_mask:#x} tells {capacity} peers "
            f"and zones apart, but there are {len(config.peers)} and {zones}; widen it"
        )
    seen: dict[tuple[str, object], str] = {
        ("id", config.ap): "ap.id",
        ("address", str(config.listen)): "peering.listen",
        ("underlay", config.tunnel.underlay): "tunnel.underlay",
        ("tunnel_address", config.tunnel.address): "tunnel.address",
        ("tunnel MAC", tunnel_mac(config.ap)): "ap.id",
    }
    for i, peer in enumerate(config.peers):
        for key, value in (
            ("id", peer.id),
            ("address", str(peer.address)),
            ("underlay", peer.underlay),
            ("tunnel_address", peer.tunnel_address),
            ("tunnel MAC", tunnel_mac(peer.id)),
        ):
            name = f"peers[{i}].{key}"
            other = seen.setdefault((key, value), name)
            if other != name:
                raise ConfigError(f"{name}: {value} is used by {other} too; give each AP its own")


def _check_successors(config: Config) -> None:
    known = {peer.id for peer in config.peers}
    for i, network in enumerate(config.networks):
        if network.successor is not None and network.successor not in known:
            names = ", ".join(sorted(known)) or "but there are none"
            raise ConfigError(
                f"networks[{i}].successor: {network.successor} is no peer; choose one of: {names}"
            )


def _check_forwards(config: Config) -> None:
    seen: dict[tuple[str, int, int], str] = {}
    for i, network in enumerate(config.networks):
        for k, forward in enumerate(network.forwards):
            name = f"networks[{i}].forwards[{k}].port"
            other = seen.setdefault((network.uplink, forward.protocol, forward.port), name)
            if other != name:
                raise ConfigError(
                    f"{name}: {forward.port} on {network.uplink} is taken by {other}; use another"
                )


def _check_network(name: str, network: Network) -> None:
    if network.uplink == network.client_interface:
        raise ConfigError(
            f"{name}.uplink: {network.uplink} is the client interface too; name another"
        )
    if network.takeover and network.nat_address is None:
        raise ConfigError(f"{name}.takeover: needs a NAT address of this AP's own; set nat to it")
    for other in ("takeover", "forwards"):
        if network.zone and getattr(network, other):
            raise ConfigError(
                f"{name}.zone: a network with a zone can't have {other}; remove one of them"
            )
    for address in network.uplink_probes:
        _refuse_no_host(f"{name}.uplink_probes", address)


def _check_clients(name: str, network: Network) -> None:
    """The gateway, and the clients that ports are forwarded to."""
    prefix, gateway = network.prefix, network.gateway
    if prefix.prefixlen > _LONGEST_PREFIX:
        raise ConfigError(
            f"{name}.prefix: {prefix} has no room for clients; use a /{_LONGEST_PREFIX} or larger"
        )
    ends = {prefix.network_address: "network", prefix.broadcast_address: "broadcast"}
    _refuse_no_host(f"{name}.gateway", gateway)
    if gateway not in prefix:
        raise ConfigError(
            f"{name}.gateway: {gateway} is outside the prefix {prefix}; use one inside"
        )
    if gateway in ends:
        raise ConfigError(
            f"{name}.gateway: {gateway} is the {ends[gateway]} address of {prefix}; "
            f"use one that a host can have, such as {prefix[1]}"
        )
    for i, forward in enumerate(network.forwards):
        key, client = f"{name}.forwards[{i}].client", forward.client
        if client not in prefix:
            raise ConfigError(
                f"{key}: {client} is outside the prefix {prefix}; use a client's address"
            )
        if client == gateway or client in ends:
            what = "gateway's" if client == gateway else ends[client]
            raise ConfigError(f"{key}: {client} is the {what} address; use a client's")


def _check_pairs(config: Config) -> None:
    for (i, one), (j, two) in combinations(enumerate(config.networks), 2):
        for key in ("name", "client_interface", "vni"):
            if getattr(one, key) == getattr(two, key):
                raise ConfigError(
                    f"networks[{j}].{key}: {getattr(two, key)} is used by networks[{i}] too; "
                    "give each network its own"
                )
        if one.zone and one.zone == two.zone:
            raise ConfigError(
                f"networks[{j}].zone: {two.zone} is used by networks[{i}] too; use another"
            )
        if one.prefix.overlaps(two.prefix) and not (one.zone and two.zone):
            raise ConfigError(
                f"networks[{j}].prefix: {two.prefix} overlaps {one.prefix} of networks[{i}]; give "
                "each network its own, or set zone in both to keep the same addresses apart"
            )


def _underlays(config: Config) -> Iterator[tuple[str, IPv4Address]]:
    yield "tunnel.underlay", config.tunnel.underlay
    yield from ((f"peers[{i}].underlay", peer.underlay) for i, peer in enumerate(config.peers))


def _in_tunnel(config: Config) -> Iterator[tuple[str, IPv4Address]]:
    yield "tunnel.address", config.tunnel.address
    for i, peer in enumerate(config.peers):
        yield f"peers[{i}].tunnel_address", peer.tunnel_address


def _check_between_aps(config: Config) -> None:
    for key, address in (*_underlays(config), *_in_tunnel(config)):
        _refuse_no_host(key, address)
        _refuse_clients(config, key, address, "; use an address outside all client networks")


def _check_nat_addresses(config: Config) -> None:
    in_tunnel = {address: key for key, address in _in_tunnel(config)}
    taken = {address: key for key, address in _underlays(config)}
    for i, network in enumerate(config.networks):
        key, nat = f"networks[{i}].nat", network.nat_address
        if nat is None:
            continue
        _refuse_no_host(key, nat)
        advice = "and would be taken for a client's; use an address of the uplink's network"
        _refuse_clients(config, key, nat, f", {advice}")
        if nat in in_tunnel:
            raise ConfigError(f"{key}: {nat} is {in_tunnel[nat]} too; use another")
        if network.takeover:
            if nat.is_link_local:
                raise ConfigError(f"{key}: {nat} is link-local; with takeover use another")
            if nat in taken:
                raise ConfigError(
                    f"{key}: {nat} is used by {taken[nat]} too; with takeover use an address that "
                    "nothing else has"
                )
            taken[nat] = key


def _refuse_clients(config: Config, key: str, address: IPv4Address, advice: str) -> None:
    for i, network in enumerate(config.networks):
        if address in network.prefix:
            raise ConfigError(
                f"{key}: {address} is inside networks[{i}].prefix {network.prefix}{advice}"
            )


def _refuse_no_host(key: str, address: IPv4Address) -> None:
    if what := no_host(address):
        raise ConfigError(f"{key}: {address} is {what}; use one that a host can have")
