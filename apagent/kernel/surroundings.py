"""What of others on this machine keeps us from our work: a sentence each, with what to do."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address

from apagent.core.domain import Domain
from apagent.errors import KernelFault
from apagent.kernel import links, nat_addresses, sysctl
from apagent.kernel.links import Address, Link
from apagent.kernel.wire import NLM_F_DUMP, Message, Netlink, attributes

_NETLINK_NETFILTER = 12
_GET_STATISTICS = (1 << 8) | 4
"""NFNL_SUBSYS_CTNETLINK and IPCTNL_MSG_CT_GET_STATS_CPU (linux/netfilter/nfnetlink_conntrack.h)."""
_NFGENMSG = struct.Struct("=BBH")
_DROPPED = 10
"""CTA_STATS_DROP: packets that found no room in the table, or lost a race for it."""
_NEARLY_FULL = 0.95
_CONNTRACK = ("net", "netfilter")


def flow_offload(flowtables: list[str]) -> Iterator[str]:
    """Flowtables of others."""
    for name in flowtables:
        yield (
            f"nftables flowtable {name} lets flows bypass us, so that they die when their client "
            "roams: turn flow offload off (on OpenWrt: flow_offloading in /etc/config/firewall)"
        )


def forwarding() -> Iterator[str]:
    """Whether this machine is a router."""
    if sysctl.read(sysctl.IP_FORWARD) != 1:
        yield "IPv4 forwarding is off: nothing passes; set the sysctl net.ipv4.ip_forward to 1"


def conntrack() -> Iterator[str]:
    """The conntrack table's settings and its room. Raises KernelFault."""
    if sysctl.read(sysctl.TCP_LOOSE) == 0:
        yield (
            "net.netfilter.nf_conntrack_tcp_loose is 0: connections that no AP knows any more "
            "hang instead of being reset; set it to 1"
        )
    count = sysctl.read((*_CONNTRACK, "nf_conntrack_count")) or 0
    limit = sysctl.read((*_CONNTRACK, "nf_conntrack_max")) or 0
    if limit and count >= _NEARLY_FULL * limit:
        yield (
            f"the conntrack table is full ({count} of {limit} entries, {_dropped()} packets "
            "dropped so far): new flows don't get through; raise net.netfilter.nf_conntrack_max, "
            "or find the client that opens so many (`apctl clients`)"
        )


def interfaces(netlink: Netlink, domain: Domain) -> Iterator[str]:
    """Interfaces and addresses that we rest on. Raises KernelFault."""
    present, addresses = links.links(netlink), links.addresses(netlink)
    for i, network in enumerate(domain.networks):
        for key, name in (
            ("client_interface", network.client_interface),
            ("uplink", network.uplink),
        ):
            yield from _interface(f"networks[{i}].{key}", name, present.get(name))
        clients = present.get(network.client_interface)
        if clients is not None and not _has(addresses, network.gateway, clients):
            yield (
                f"{clients.name} has lost the gateway's address {network.gateway} "
                f"(networks[{i}].gateway): clients reach nothing; add it again"
            )
        if network.takeover and network.nat_address is not None:
            yield from _foreign_nat_address(f"networks[{i}].nat", network.nat_address, addresses)
    if not _has(addresses, domain.me.underlay):
        yield (
            f"no interface has the address {domain.me.underlay} (tunnel.underlay): nothing goes "
            "through the tunnel; add it again"
        )


def _foreign_nat_address(key: str, nat: IPv4Address, addresses: Iterable[Address]) -> Iterator[str]:
    for address in addresses:
        if address.local == nat and not nat_addresses.is_ours(address):
            yield (
                f"{nat} ({key}) is configured on {nat_addresses.interface_of(address)}, but with "
                "takeover the agent adds and removes it itself: remove it there, or two APs may "
                "answer for it"
            )


def _interface(key: str, name: str, link: Link | None) -> Iterator[str]:
    if link is None:
        yield (
            f"interface {name} is gone ({key}): what goes through it waits until it is there "
            "again, and is mended then"
        )
    elif not link.up:
        yield f"interface {name} is down ({key}): set it up"


def _has(addresses: list[Address], wanted: IPv4Address, on: Link | None = None) -> bool:
    return any(a.local == wanted and (on is None or a.ifindex == on.ifindex) for a in addresses)


def _dropped() -> int:
    """Packets that conntrack has dropped, over all processors; 0 if it doesn't say."""
    netlink = Netlink(_NETLINK_NETFILTER)
    try:
        request = Message(_GET_STATISTICS, NLM_F_DUMP, _NFGENMSG.pack(0, 0, 0), "conntrack drops")
        counted = (dict(attributes(body, _NFGENMSG.size)) for body in netlink.dump(request))
        return sum(int.from_bytes(each.get(_DROPPED, b""), "big") for each in counted)
    except KernelFault:
        return 0
    finally:
        netlink.close()
