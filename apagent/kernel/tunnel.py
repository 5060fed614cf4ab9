"""The tunnel: one VXLAN device a network, with a static entry for every peer.

Nothing is learned and nothing is flooded: a peer's MAC, underlay and tunnel address follow from the
roam domain alone, so a packet to an anchor never waits for an answer from it.
"""

from __future__ import annotations

from collections.abc import Iterable

from apagent.core.domain import Domain, Network
from apagent.errors import KernelFault
from apagent.kernel import links, sysctl
from apagent.kernel.links import Address, Link, Vxlan
from apagent.kernel.rtnetlink import (
    AF_BRIDGE,
    AF_INET,
    NTF_SELF,
    NUD_PERMANENT,
    Neighbour,
    delete_neighbour,
    device_entries,
    mac_bytes,
    neighbours,
    set_neighbour,
)
from apagent.kernel.wire import Message, Netlink

_LOOSE = 2
"""rp_filter: the source must be reachable, by any interface (RFC 3704, section 2.4). Packets of a
flow come through the tunnel while the route back to their source is the uplink."""


def prepare_tunnels(netlink: Netlink, domain: Domain) -> None:
    """Make every network's tunnel device what `domain` says; remove those of former networks.

    A device that is right keeps its index, its routes and its entries. Raises KernelFault.
    """
    present = links.links(netlink)
    wanted = {domain.device(network): network for network in domain.networks}
    # A former network's device may hold a VNI that a new one needs, so it goes first.
    netlink.request(
        links.delete_link(link)
        for link in own_devices(present.values(), domain)
        if link.name not in wanted
    )
    for network in domain.networks:
        _prepare_device(netlink, domain, network, present.get(domain.device(network)))
    indexes = {name: link.ifindex for name, link in links.links(netlink).items()}
    held = links.addresses(netlink)
    for name in wanted:
        _prepare_address(netlink, Address(indexes[name], domain.me.tunnel_address, 32), held, name)
        _prepare_peers(netlink, domain, indexes[name], name)
        sysctl.ensure(sysctl.interface(name, "rp_filter"), _LOOSE)
        sysctl.ensure(sysctl.interface(name, "send_redirects"), 0)


def remove_tunnels(netlink: Netlink, domain: Domain) -> list[str]:
    """Remove every tunnel device of ours; a line each. Raises KernelFault."""
    devices = own_devices(links.links(netlink).values(), domain)
    netlink.request(links.delete_link(link) for link in devices)
    return [f"VXLAN device {link.name}" for link in devices]


def own_devices(present: Iterable[Link], domain: Domain) -> list[Link]:
    """The VXLAN devices with our prefix."""
    return [
        link
        for link in present
        if link.kind == "vxlan" and link.name.startswith(domain.device_prefix)
    ]


def _prepare_device(
    netlink: Netlink, domain: Domain, network: Network, present: Link | None
) -> None:
    name, me = domain.device(network), domain.me
    wanted = Vxlan(network.vni, me.underlay, domain.tunnel_port)
    if present is not None and present.kind != "vxlan":
        raise KernelFault(
            f"interface {name} exists and is not a VXLAN device: "
            "remove it, or give kernel.device_prefix another value"
        )
    if present is None or present.vxlan != wanted:
        if present is not None:
            netlink.request([links.delete_link(present)])
        netlink.request([links.make_vxlan(name, me.tunnel_mac, domain.tunnel_mtu, wanted)])
    elif (present.mac, present.mtu, present.up) != (me.tunnel_mac, domain.tunnel_mtu, True):
        netlink.request([links.change_link(present, me.tunnel_mac, domain.tunnel_mtu)])


def _prepare_address(
    netlink: Netlink, wanted: Address, held: Iterable[Address], device: str
) -> None:
    present = [address for address in held if address.ifindex == wanted.ifindex]
    messages: list[Message] = []
    if wanted not in present:
        messages.append(links.add_address(wanted, device))
    messages += [links.delete_address(a, device) for a in present if a != wanted]
    netlink.request(messages)


def _prepare_peers(netlink: Netlink, domain: Domain, ifindex: int, device: str) -> None:
    entries = {
        Neighbour(AF_BRIDGE, ifindex, mac_bytes(p.tunnel_mac), p.underlay.packed, flags=NTF_SELF)
        for p in domain.peers
    }
    permanent = {
        Neighbour(AF_INET, ifindex, mac_bytes(p.tunnel_mac), p.tunnel_address.packed)
        for p in domain.peers
    }
    _replace(netlink, permanent, neighbours(netlink, ifindex), f"neighbour on {device}")
    _replace(netlink, entries, device_entries(netlink, ifindex), f"forwarding entry on {device}")


def _replace(
    netlink: Netlink, wanted: set[Neighbour], found: Iterable[Neighbour], what: str
) -> None:
    """Install what is missing, then delete what is installed for nobody."""
    present = {entry for entry in found if entry.state & NUD_PERMANENT}
    netlink.request(set_neighbour(entry, f"{what} {entry.mac}") for entry in wanted - present)
    keys = {_key(entry) for entry in wanted}
    netlink.request(
        delete_neighbour(entry, f"removing {what} {entry.mac}")
        for entry in present
        if _key(entry) not in keys
    )


def _key(entry: Neighbour) -> bytes:
    """What a table finds an entry by: the address, or the MAC in a forwarding table."""
    return entry.lladdr if entry.family == AF_BRIDGE else entry.address
