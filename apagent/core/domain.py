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

from apagent.core.model import ApId, Mac, NetworkName, SocketKey, packed_socket

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
OWN_MARKS = 1
"""Numbers in the mark that are neither a peer's nor a zone's (`Domain.here_mark`)."""
_LIMITED_BROADCAST = IPv4Address("255.255.255.255")


def tunnel_mac(ap: ApId) -> Mac:
    """The MAC of an AP's tunnel devices, derived from its id: locally administered, unicast."""
    digest = hashlib.sha256(b"apagent tunnel " + ap.encode()).digest()
    return Mac(":".join(f"{octet:02x}" for octet in b"\x02" + digest[:5]))


def tunnel_address(ap: ApId, range_: IPv4Network) -> IPv4Address:
    """An AP's address inside the tunnel, derived from its id: any host address of `range_`."""
    digest = hashlib.sha256(b"apagent tunnel " + ap.encode()).digest()
    return range_[1 + int.from_bytes(digest[5:13], "big") % (range_.num_addresses - 2)]


def no_host(address: IPv4Address) -> str:
    """Why no host can have the address, as "a loopback address"; empty: one can."""
    if address.is_multicast:
        return "a multicast address"
    if address.is_loopback:
        return "a loopback address"
    if address.is_unspecified:
        return "the unspecified address"
    return "the broadcast address" if address == _LIMITED_BROADCAST else ""


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
    taken = set(numbers.values())
    # A vanished peer's number may still stand in the session maps: it is given away last.
    stale = set(adopted.values()) - taken
    free = iter(sorted({*range(1, capacity + 1)} - taken, key=lambda n: (n in stale, n)))
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
class Forward:
    """A static port forward: what comes to our uplink's `port` goes to a client's."""

    protocol: int
    port: int
    client: IPv4Address
    client_port: int

    @property
    def inside(self) -> SocketKey:
        """The client's socket."""
        return packed_socket(self.client, self.protocol, self.client_port)

    def outside(self, address: IPv4Address) -> SocketKey:
        """What the outside sees of it, if we have this address."""
        return packed_socket(address, self.protocol, self.port)


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
    isolate_clients: bool = False
    """Keep clients on different APs apart; else they reach each other untranslated."""
    forwards: tuple[Forward, ...] = ()
    takeover: bool = False
    """`nat_address` is ours to put on the uplink, and other APs may take it over with its flows."""
    successor: ApId | None = None
    """The AP that takes over from us if it can; None: rendezvous hashing chooses."""
    uplink_probes: tuple[IPv4Address, ...] = ()
    """Hosts beyond the uplink; where none of them answers, the uplink leads nowhere."""
    zone: int = 0
    """Conntrack zone of the clients' side, where another network here has the same addresses."""

    @property
    def forwarded(self) -> dict[SocketKey, SocketKey]:
        """Our port forwards: what the outside sees -> the client's socket."""
        address = self.nat_address or IPv4Address(0)
        return {forward.outside(address): forward.inside for forward in self.forwards}

    @property
    def lets_forwards_move(self) -> bool:
        """Whether port forwards belong to NAT addresses, and move with them from AP to AP.

        A network with a zone has none.
        """
        return self.takeover and not self.zone


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
    """Priority of our first policy rule; the next two are ours too."""
    route_table_base: int
    nflog_group: int
    device_prefix: str
    sync_timeout_s: float
    """How long a fresh AP may hold back what could belong to a peer's flow."""
    dead_after_rounds: int = 3
    """Rounds of probes (core/liveness.py) without an answer that make a peer a dead anchor."""

    @cached_property
    def peer_by_id(self) -> dict[ApId, Ap]:
        """The peers by name."""
        return {peer.id: peer for peer in self.peers}

    @cached_property
    def network_by_name(self) -> dict[NetworkName, Network]:
        """The networks by name."""
        return {network.name: network for network in self.networks}

    @cached_property
    def _network_index(self) -> dict[NetworkName, int]:
        return {name: i for i, name in enumerate(sorted(self.network_by_name))}

    def others(self, network: Network) -> list[Network]:
        """The other networks."""
        return [other for other in self.networks if other is not network]

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

    @cached_property
    def _zone_numbers(self) -> dict[NetworkName, int]:
        zoned = sorted(network.name for network in self.networks if network.zone)
        highest = self.mark_mask >> self.mark_shift
        return {name: highest - i for i, name in enumerate(zoned)}

    def zone_mark(self, network: Network) -> int:
        """The fwmark bits that tell a packet to a client of a network with a zone.

        Counted from the top, while anchors' numbers count from 1.
        """
        return self._zone_numbers[network.name] << self.mark_shift

    @property
    def here_mark(self) -> int:
        """The fwmark bits that tell a packet to a client that has just come here."""
        highest = self.mark_mask >> self.mark_shift
        return highest - len(self._zone_numbers) << self.mark_shift

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
