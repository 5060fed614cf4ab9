"""The configuration file: TOML in, frozen and checked objects out.

Unknown keys are refused. Every error text starts with the full name of the key and says what to do.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from apagent.config_checks import check
from apagent.core.domain import (
    OWN_MARKS,
    Ap,
    Domain,
    Forward,
    Network,
    allocate_numbers,
    tunnel_address,
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
_DIGITS_AND_DOTS = re.compile(r"[0-9.]+")
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
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"{path}: can't be read ({error.strerror}); is it the right file?"
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
    except ValueError as error:  # also of numbers beyond all bounds
        raise ConfigError(f"not valid TOML: {error}") from None
    top.expect("ap", "tunnel", "peering", "peers", "networks", "control", "kernel", "log")
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
    check(config)
    return config


def _ap(table: Table) -> ApId:
    table.expect("id")
    return ApId(table.text("id", of=_AP_ID, form=_AP_ID_FORM))


def _tunnel(table: Table, ap: ApId) -> tuple[TunnelConfig, IPv4Network]:
    table.expect("underlay", "port", "range", "address", "mtu")
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
    return tunnel, range_


def _peering(table: Table) -> tuple[Endpoint, float, float]:
    table.expect("listen", "sync_timeout_s", "dead_after_s")
    default = f"127.0.0.1:{DEFAULT_PEER_PORT}"
    listen = _endpoint(table, "listen", default)
    timeout = table.seconds("sync_timeout_s", 5.0, 0.1, 600.0)
    dead_after = table.seconds("dead_after_s", 0.5, 0.4, 60.0)
    return listen, timeout, dead_after


def _peer(table: Table, range_: IPv4Network) -> PeerConfig:
    table.expect("id", "address", "underlay", "tunnel_address")
    ap = ApId(table.text("id", of=_AP_ID, form=_AP_ID_FORM))
    address = (
        table.address("tunnel_address")
        if table.has("tunnel_address")
        else tunnel_address(ap, range_)
    )
    return PeerConfig(
        id=ap,
        address=_endpoint(table, "address", None),
        underlay=table.address("underlay"),
        tunnel_address=address,
    )


def _network(table: Table) -> Network:
    table.expect(
        "name",
        "client_interface",
        "prefix",
        "gateway",
        "vni",
        "uplink",
        "nat",
        "takeover",
        "successor",
        "uplink_probes",
        "isolate_clients",
        "zone",
        "forwards",
    )
    return Network(
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


def _forward(table: Table) -> Forward:
    table.expect("protocol", "port", "client", "client_port")
    port = table.integer("port", None, 1, 65535)
    return Forward(
        protocol=PROTOCOL_NUMBERS[table.choice("protocol", "tcp", ("tcp", "udp"))],
        port=port,
        client=table.address("client"),
        client_port=table.integer("client_port", port, 1, 65535),
    )


def _nat(table: Table) -> IPv4Address | None:
    if not table.has("nat"):
        return None
    text = table.text("nat", of=_ANY, form="text")
    if text == "masquerade":
        return None
    if not _is_address(text):
        raise table.error("nat", f'{text!r} is neither "masquerade" nor an IPv4 address')
    return IPv4Address(text)


def _successor(table: Table) -> ApId | None:
    return (
        ApId(text)
        if (text := table.text("successor", "", of=_AP_ID_OR_NONE, form=_AP_ID_FORM))
        else None
    )


def _control(table: Table) -> Path:
    table.expect("socket")
    return Path(table.text("socket", str(DEFAULT_SOCKET), of=_SOCKET, form=_SOCKET_FORM))


def _kernel(table: Table) -> KernelConfig:
    table.expect(
        "table",
        "mark_mask",
        "route_protocol",
        "rule_priority",
        "route_table_base",
        "nflog_group",
        "device_prefix",
    )
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
    return kernel


def _log(table: Table) -> str:
    table.expect("level")
    return table.choice("level", "info", _LOG_LEVELS)


def _interface(table: Table, key: str) -> str:
    return table.text(key, of=_INTERFACE, form="an interface name (at most 15 characters)")


def _endpoint(table: Table, key: str, default: str | None) -> Endpoint:
    host, _, port = table.text(key, default, of=_ENDPOINT, form=_ENDPOINT_FORM).rpartition(":")
    if _DIGITS_AND_DOTS.fullmatch(host) and not _is_address(host):
        raise table.error(key, f"{host} is neither an IPv4 address nor a name")
    if not 1 <= int(port) <= 65535:
        raise table.error(key, f"port {port} is out of range; expected 1 to 65535")
    return Endpoint(host, int(port))


def _is_address(text: str) -> bool:
    try:
        IPv4Address(text)
    except ValueError:
        return False
    return True
