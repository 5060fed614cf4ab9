"""The roam domain as one AP sees it: itself, its peers, its networks, and what is ours by number.

All of it is fixed for a run of the agent. Kernel objects are named and numbered from here alone, so
that a restarted agent recognises what an earlier run left.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv4Address, IPv4Network

from apagent.core.model import ApId, Mac, NetworkName

VXLAN_OVERHEAD = 50
"""Bytes that VXLAN adds: 20 IPv4, 8 UDP, 8 VXLAN, 14 inner Ethernet (RFC 7348, section 5)."""
TCP_IPV4_HEADERS = 40
"""20 bytes of IPv4 and 20 of TCP, which an MSS does not count (RFC 9293, section 3.7.1)."""
ANCHOR_TAG = 0x61700000
"""High half of an anchor's value in the session maps; the low half is its number.

The maps' value is an skb priority (a traffic class `major:minor`), which is free for use between
prerouting and forwarding; major 6170 ("ap" in ASCII) keeps it apart from any real one.
"""
TABLES_PER_NETWORK = 256


def tunnel_mac(ap: ApId) -> Mac:
    """The MAC of an AP's tunnel devices, derived from its id: locally administered, unicast."""
    digest = hashlib.sha256(b"apagent tunnel " + ap.encode()).digest()
    return Mac(":".join(f"{octet:02x}" for octet in b"\x02" + digest[:5]))


def tunnel_address(ap: ApId, range_: IPv4Network) -> IPv4Address:
    """An AP's address inside the tunnel, derived from its id: any host address of `range_`."""
    digest = hashlib.sha256(b"apagent tunnel " + ap.encode()).digest()
    return range_[1 + int.from_bytes(digest[5:13], "big") % (range_.num_addresses - 2)]


def allocate_numbers(
    peers: Iterable[ApId], adopted: Mapping[ApId, int], capacity: int
) -> dict[ApId, int]:
    """Give every peer a number from 1 to `capacity`, keeping those that the kernel already holds.

    Numbers are local to this AP. Raises ValueError if there are more peers than numbers.
    """
    wanted = sorted(peers)
    if len(wanted) > capacity:
        raise ValueError(f"{len(wanted)} peers, but the mark mask has room for {capacity}")
    numbers = {ap: adopted[ap] for ap in wanted if 1 <= adopted.get(ap, 0) <= capacity}
    if len(set(numbers.values())) != len(numbers):
        numbers = {}
    free = (n for n in range(1, capacity + 1) if n not in set(numbers.values()))
    for ap in wanted:
        if ap not in numbers:
            numbers[ap] = next(free)
    return numbers


@dataclass(frozen=True)
class Ap:
    """An access point of the domain; `number` is local to this agent (0 for itself)."""

    id: ApId
    number: int
    tunnel_address: IPv4Address
    underlay: IPv4Address

    @cached_property
    def tunnel_mac(self) -> Mac:
        """The MAC of its tunnel devices."""
        return tunnel_mac(self.id)


@dataclass(frozen=True, slots=True)
class Network:
    """A client network: the same prefix, gateway address and gateway MAC on every AP."""

    name: NetworkName
    client_interface: str
    prefix: IPv4Network
    gateway: IPv4Address
    vni: int
    uplink: str
    nat_address: IPv4Address | None
    """Source address of translated packets; None: masquerade with the uplink's own address."""


@dataclass(frozen=True)
class Domain:
    """Everything that is fixed for a run: who we are, who the others are, what is ours."""

    me: Ap
    peers: tuple[Ap, ...]
    networks: tuple[Network, ...]
    tunnel_port: int
    tunnel_mtu: int
    table: str
    """Name of our nftables table (family inet)."""
    mark_mask: int
    """The fwmark bits that are ours, contiguous."""
    route_protocol: int
    rule_priority: int
    """Priority of our first policy rule; the next one is ours too."""
    route_table_base: int
    nflog_group: int
    device_prefix: str

    @cached_property
    def peer_by_id(self) -> dict[ApId, Ap]:
        """The peers by name."""
        return {peer.id: peer for peer in self.peers}

    @cached_property
    def peer_by_number(self) -> dict[int, Ap]:
        """The peers by local number."""
        return {peer.number: peer for peer in self.peers}

    @cached_property
    def network_by_name(self) -> dict[NetworkName, Network]:
        """The networks by name."""
        return {network.name: network for network in self.networks}

    @cached_property
    def _network_index(self) -> dict[NetworkName, int]:
        return {name: i for i, name in enumerate(sorted(self.network_by_name))}

    @property
    def mark_shift(self) -> int:
        """How far an anchor's number is shifted into the mark."""
        return (self.mark_mask & -self.mark_mask).bit_length() - 1

    @property
    def mss(self) -> int:
        """The largest TCP segment that fits the tunnel."""
        return self.tunnel_mtu - TCP_IPV4_HEADERS

    def mark(self, ap: Ap) -> int:
        """The fwmark bits that send a packet to the anchor `ap`."""
        return ap.number << self.mark_shift

    def device(self, network: Network) -> str:
        """Name of the network's tunnel device."""
        return f"{self.device_prefix}{network.name}"

    def anchor_table(self, network: Network, ap: Ap) -> int:
        """Routing table with the default route to the anchor `ap`."""
        return self.host_table(network) + ap.number

    def host_table(self, network: Network) -> int:
        """Routing table with the host routes of clients that other APs serve."""
        return self.route_table_base + self._network_index[network.name] * TABLES_PER_NETWORK

    @property
    def route_tables(self) -> range:
        """Every routing table that is ours."""
        return range(
            self.route_table_base,
            self.route_table_base + max(1, len(self.networks)) * TABLES_PER_NETWORK,
        )
