"""The configuration file: TOML in, frozen and checked objects out.

Unknown keys are refused. Every error text starts with the full name of the key and says what to do.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from itertools import combinations
from pathlib import Path

from apagent.core.domain import (
    OWN_MARKS,
    Ap,
    Domain,
    Forward,
    Network,
    allocate_numbers,
    tunnel_address,
    tunnel_mac,
)
from apagent.core.liveness import ROUND_S
from apagent.core.model import PROTOCOL_NUMBERS, ApId, NetworkName
from apagent.errors import ConfigError
from apagent.toml_table import Table

DEFAULT_PATH = Path("/etc/apagent/agent.toml")
DEFAULT_SOCKET = Path("/run/apagent/control.sock")
DEFAULT_PEER_PORT = 7411
DEFAULT_TUNNEL_RANGE = "100.127.0.0/16"
"""The end of the shared address space (RFC 6598): nothing here is routed beyond the tunnel."""
MAX_TUNNEL_PREFIX_LENGTH = 24
VXLAN_PORT = 4789
"""IANA's port for VXLAN (RFC 7348, section 5)."""

_AP_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}")
_AP_ID_OR_NONE = re.compile(rf"(?:{_AP_ID.pattern})?")
_NETWORK_NAME = re.compile(r"[a-z][a-z0-9_]{0,9}")
_TABLE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,31}")
_DEVICE_PREFIX = re.compile(r"[a-z][a-z0-9-]{0,4}")
_INTERFACE = re.compile(r"[^\s/:]{1,15}")
_ENDPOINT = re.compile(r"[A-Za-z0-9.-]+:[0-9]{1,5}")
_SOCKET = re.compile(r"/.{1,99}")
_ANY = re.compile(r".*")
_AP_ID_FORM = "1 to 32 of letters, digits and _.-, a letter or digit first"
_ENDPOINT_FORM = "ADDRESS:PORT such as 10.99.0.1:7411"
_SOCKET_FORM = "an absolute path of at most 100 characters"
_LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A host (address or name) and a TCP port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class PeerConfig:
    """A `[[peers]]` table."""

    id: ApId
    address: Endpoint
    underlay: IPv4Address
    tunnel_address: IPv4Address


@dataclass(frozen=True, slots=True)
class TunnelConfig:
    """The `[tunnel]` table."""

    underlay: IPv4Address
    port: int
    address: IPv4Address
    mtu: int | None


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """The `[kernel]` table: what of the machine is ours."""

    table: str
    mark_mask: int
    route_protocol: int
    rule_priority: int
    route_table_base: int
    nflog_group: int
    device_prefix: str

    @property
    def capacity(self) -> int:
        """How many numbers there are in the mark mask."""
        return self.mark_mask // (self.mark_mask & -self.mark_mask)


@dataclass(frozen=True, slots=True)
class Config:
    """A whole, checked configuration."""

    ap: ApId
    tunnel: TunnelConfig
    listen: Endpoint
    peers: tuple[PeerConfig, ...]
    networks: tuple[Network, ...]
    socket: Path
    kernel: KernelConfig
    sync_timeout_s: float
    dead_after_s: float
    log_level: str

    def domain(self, adopted: Mapping[ApId, int], tunnel_mtu: int) -> Domain:
        """The roam domain, with the anchors' numbers that the kernel already holds.

        `tunnel_mtu` is what fits the underlay; a configured MTU takes precedence.
        """
        zones = sum(network.zone > 0 for network in self.networks)
        capacity = self.kernel.capacity - zones - OWN_MARKS
        numbers = allocate_numbers((p.id for p in self.peers), adopted, capacity)
        return Domain(
            me=Ap(self.ap, 0, self.tunnel.address, self.tunnel.underlay),
            peers=tuple(Ap(p.id, numbers[p.id], p.tunnel_address, p.underlay) for p in self.peers),
            networks=self.networks,
            tunnel_port=self.tunnel.port,
            tunnel_mtu=self.tunnel.mtu or tunnel_mtu,
            table=self.kernel.table,
            mark_mask=self.kernel.mark_mask,
            route_protocol=self.kernel.route_protocol,
            rule_priority=self.kernel.rule_priority,
            route_table_base=self.kernel.route_table_base,
            nflog_group=self.kernel.nflog_group,
            device_prefix=self.kernel.device_prefix,
            sync_timeout_s=self.sync_timeout_s,
            # One round may just have been answered, and the last one is judged by the next.
            dead_after_rounds=round(self.dead_after_s / ROUND_S) - 2,
        )


def load(path: Path) -> Config:
    """Read and check the file at `path`. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: can't be read ({error.strerror}); name the file with --config"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None
    try:
        return parse(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse(text: str) -> Config:
    """Check the text of a configuration file. Raises ConfigError."""
    try:
        top = Table(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not valid TOML: {error}") from None
    ap = _ap(top.table("ap"))
    tunnel, tunnel_range = _tunnel(top.table("tunnel"), ap)
    listen, sync_timeout_s, dead_after_s = _peering(top.table("peering"))
    config = Config(
        ap=ap,
        tunnel=tunnel,
        listen=listen,
        peers=tuple(_peer(table, tunnel_range) for table in top.tables("peers")),
        networks=tuple(_network(table) for table in top.tables("networks")),
        socket=_control(top.table("control")),
        kernel=_kernel(top.table("kernel")),
        sync_timeout_s=sync_timeout_s,
        dead_after_s=dead_after_s,
        log_level=_log(top.table("log")),
    )
    top.finish()
    _check_peers(config)
    _check_networks(config)
    return config


def _ap(table: Table) -> ApId:
    ap = ApId(table.text("id", of=_AP_ID, form=_AP_ID_FORM))
    table.finish()
    return ap


def _tunnel(table: Table, ap: ApId) -> tuple[TunnelConfig, IPv4Network]:
    range_ = table.prefix("range", DEFAULT_TUNNEL_RANGE)
    if range_.prefixlen > MAX_TUNNEL_PREFIX_LENGTH:
        raise table.error(
            "range", f"{range_} is too small; use a /{MAX_TUNNEL_PREFIX_LENGTH} or larger"
        )
    address = table.address("address") if table.has("address") else tunnel_address(ap, range_)
    tunnel = TunnelConfig(
        underlay=table.address("underlay"),
        port=table.integer("port", VXLAN_PORT, 1, 65535),
        address=address,
        mtu=table.integer("mtu", None, 576, 65485) if table.has("mtu") else None,
    )
    table.finish()
    return tunnel, range_


def _peering(table: Table) -> tuple[Endpoint, float, float]:
    default = f"127.0.0.1:{DEFAULT_PEER_PORT}"
    listen = _endpoint(table, "listen", default)
    timeout = table.seconds("sync_timeout_s", 5.0, 0.1, 600.0)
    dead_after = table.seconds("dead_after_s", 0.5, 0.4, 60.0)
    table.finish()
    return listen, timeout, dead_after


def _peer(table: Table, range_: IPv4Network) -> PeerConfig:
    ap = ApId(table.text("id", of=_AP_ID, form=_AP_ID_FORM))
    address = (
        table.address("tunnel_address")
        if table.has("tunnel_address")
        else tunnel_address(ap, range_)
    )
    peer = PeerConfig(
        id=ap,
        address=_endpoint(table, "address", None),
        underlay=table.address("underlay"),
        tunnel_address=address,
    )
    table.finish()
    return peer


def _network(table: Table) -> Network:
    network = Network(
        name=NetworkName(
            table.text("name", of=_NETWORK_NAME, form="1 to 10 of a-z, 0-9 and _, a letter first")
        ),
        client_interface=_interface(table, "client_interface"),
        prefix=table.prefix("prefix"),
        gateway=table.address("gateway"),
        vni=table.integer("vni", None, 1, (1 << 24) - 1),
        uplink=_interface(table, "uplink"),
        nat_address=_nat(table),
        isolate_clients=table.flag("isolate_clients", default=False),
        forwards=tuple(_forward(forward) for forward in table.tables("forwards")),
        takeover=table.flag("takeover", default=False),
        successor=_successor(table),
        uplink_probes=table.addresses("uplink_probes"),
        zone=table.integer("zone", 0, 0, 65535),
    )
    if network.gateway not in network.prefix:
        raise table.error(
            "gateway", f"{network.gateway} is outside the prefix {network.prefix}; use one inside"
        )
    if network.uplink == network.client_interface:
        raise table.error("uplink", f"{network.uplink} is the client interface too; name another")
    if network.takeover and network.nat_address is None:
        raise table.error("takeover", "needs a NAT address of this AP's own; set nat to it")
    if network.zone and network.takeover:
        raise table.error("zone", "a network with a zone can't have takeover; remove one of them")
    if network.zone and network.forwards:
        raise table.error("zone", "a network with a zone can't have forwards; remove one of them")
    for i, forward in enumerate(network.forwards):
        if forward.client not in network.prefix:
            name = table.name(f"forwards[{i}].client")
            raise ConfigError(f"{name}: {forward.client} is outside the prefix {network.prefix}")
    table.finish()
    return network


def _forward(table: Table) -> Forward:
    port = table.integer("port", None, 1, 65535)
    forward = Forward(
        protocol=PROTOCOL_NUMBERS[table.choice("protocol", "tcp", ("tcp", "udp"))],
        port=port,
        client=table.address("client"),
        client_port=table.integer("client_port", port, 1, 65535),
    )
    table.finish()
    return forward


def _nat(table: Table) -> IPv4Address | None:
    if not table.has("nat"):
        return None
    if table.text("nat", of=_ANY, form="text") == "masquerade":
        return None
    try:
        return table.address("nat")
    except ConfigError:
        raise table.error("nat", 'expected "masquerade" or an IPv4 address') from None


def _successor(table: Table) -> ApId | None:
    return (
        ApId(text)
        if (text := table.text("successor", "", of=_AP_ID_OR_NONE, form=_AP_ID_FORM))
        else None
    )


def _control(table: Table) -> Path:
    socket = Path(table.text("socket", str(DEFAULT_SOCKET), of=_SOCKET, form=_SOCKET_FORM))
    table.finish()
    return socket


def _kernel(table: Table) -> KernelConfig:
    kernel = KernelConfig(
        table=table.text(
            "table", "apagent", of=_TABLE_NAME, form="letters, digits and _, a letter first"
        ),
        mark_mask=table.integer("mark_mask", 0xFF000000, 1, 0xFFFFFFFF),
        route_protocol=table.integer("route_protocol", 176, 5, 255),
        rule_priority=table.integer("rule_priority", 700, 1, 32763),
        route_table_base=table.integer("route_table_base", 77000, 256, 0xFFFF0000),
        nflog_group=table.integer("nflog_group", 77, 0, 65535),
        device_prefix=table.text(
            "device_prefix", "apv-", of=_DEVICE_PREFIX, form="1 to 5 of a-z, 0-9 and -"
        ),
    )
    if bin(kernel.mark_mask).strip("0b").count("0"):
        raise table.error("mark_mask", f"{kernel.mark_mask:#x} has gaps; use adjacent bits")
    table.finish()
    return kernel


def _log(table: Table) -> str:
    level = table.choice("level", "info", _LOG_LEVELS)
    table.finish()
    return level


def _interface(table: Table, key: str) -> str:
    return table.text(key, of=_INTERFACE, form="an interface name (at most 15 characters)")


def _endpoint(table: Table, key: str, default: str | None) -> Endpoint:
    host, _, port = table.text(key, default, of=_ENDPOINT, form=_ENDPOINT_FORM).rpartition(":")
    if not 1 <= int(port) <= 65535:
        raise table.error(key, f"port {port} is out of range; expected 1 to 65535")
    return Endpoint(host, int(port))


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
            names = ", ".join(sorted(known)) or "there are none"
            raise ConfigError(f"networks[{i}].successor: {network.successor} is no peer: {names}")


def _check_nat_addresses(config: Config) -> None:
    seen: dict[IPv4Address | None, int] = {}
    for i, network in enumerate(config.networks):
        if network.takeover and seen.setdefault(network.nat_address, i) != i:
            raise ConfigError(
                f"networks[{i}].nat: {network.nat_address} is used by "
                f"networks[{seen[network.nat_address]}] too; with takeover give each its own"
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


def _check_networks(config: Config) -> None:
    if not config.networks:
        raise ConfigError("networks: is missing; add at least one [[networks]] table")
    _check_forwards(config)
    _check_successors(config)
    _check_nat_addresses(config)
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
    for i, network in enumerate(config.networks):
        for owner, address in (
            ("tunnel.underlay", config.tunnel.underlay),
            ("tunnel.address", config.tunnel.address),
            *((f"peers[{k}].tunnel_address", p.tunnel_address) for k, p in enumerate(config.peers)),
        ):
            if address in network.prefix:
                raise ConfigError(
                    f"{owner}: {address} is inside networks[{i}].prefix {network.prefix}; "
                    "use an address outside all client networks"
                )
