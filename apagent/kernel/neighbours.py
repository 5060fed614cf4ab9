"""The client interface: neighbour entries of the clients served here, and forgetting clients.

Our entries are permanent and carry our protocol number, by which they are told from anybody else's.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address

from apagent.core.domain import Domain, Network
from apagent.core.model import Mac
from apagent.kernel.port import Change
from apagent.kernel.rtnetlink import (
    AF_INET,
    NTF_MASTER,
    NUD_NOARP,
    NUD_PERMANENT,
    Neighbour,
    bridge_entries,
    delete_neighbour,
    mac_bytes,
    neighbours,
    set_neighbour,
)
from apagent.kernel.wire import Message, Netlink


def read_clients(netlink: Netlink, domain: Domain, network: Network) -> dict[IPv4Address, Mac]:
    """The permanent entries that we installed on the client interface; none without one.

    Raises KernelFault.
    """
    return {
        IPv4Address(entry.address): entry.mac
        for entry in _own_entries(netlink, domain, network)
        if IPv4Address(entry.address) in network.prefix
    }


def remove_clients(netlink: Netlink, domain: Domain) -> list[str]:
    """Remove the entries that we installed on any client interface. Raises KernelFault."""
    removed: list[str] = []
    for network in domain.networks:
        entries = _own_entries(netlink, domain, network)
        names = [
            f"neighbour {IPv4Address(e.address)} on {network.client_interface}" for e in entries
        ]
        netlink.request(
            (delete_neighbour(e, name) for e, name in zip(entries, names, strict=True)),
            ignore=frozenset({errno.ENOENT}),
        )
        removed += names
    return removed


def client_messages(
    domain: Domain, network: Network, changes: Mapping[IPv4Address, Change[Mac]]
) -> tuple[list[Message], list[Message]]:
    """What installs the new entries, and what deletes the old ones; nothing without interface."""
    ifindex = _client_index(network) if changes else None
    if ifindex is None:
        return [], []
    install: list[Message] = []
    delete: list[Message] = []
    for address, change in changes.items():
        what = f"neighbour {address} on {network.client_interface}"
        if change.new is None:
            delete.append(delete_neighbour(Neighbour(AF_INET, ifindex, b"", address.packed), what))
        else:
            lladdr, protocol = mac_bytes(change.new), domain.route_protocol
            entry = Neighbour(AF_INET, ifindex, lladdr, address.packed, protocol=protocol)
            install.append(set_neighbour(entry, what))
    return install, delete


def forget(netlink: Netlink, network: Network, macs: Iterable[Mac]) -> None:
    """Delete what the bridge learned of `macs` and what the neighbour table resolved to them.

    Permanent and static entries stay. Raises KernelFault.
    """
    gone = {mac_bytes(mac) for mac in macs}
    ifindex = _client_index(network)
    if ifindex is None:
        return
    learned = [
        entry._replace(flags=NTF_MASTER)
        for entry in bridge_entries(netlink, ifindex)
        if entry.lladdr in gone and not entry.state & (NUD_PERMANENT | NUD_NOARP)
    ]
    resolved = [
        entry
        for entry in neighbours(netlink, ifindex)
        if entry.lladdr in gone and not entry.state & (NUD_PERMANENT | NUD_NOARP)
    ]
    netlink.request(
        (
            delete_neighbour(entry, f"forgetting {entry.mac} on {network.client_interface}")
            for entry in (*learned, *resolved)
        ),
        ignore=frozenset({errno.ENOENT}),
    )


def _own_entries(netlink: Netlink, domain: Domain, network: Network) -> list[Neighbour]:
    ifindex = _client_index(network)
    return [
        entry
        for entry in (() if ifindex is None else neighbours(netlink, ifindex))
        if entry.state & NUD_PERMANENT and entry.protocol == domain.route_protocol
    ]


def _client_index(network: Network) -> int | None:
    """None: the interface is gone, and with it all its entries; it may come back."""
    try:
        return socket.if_nametoindex(network.client_interface)
    except OSError:
        return None
