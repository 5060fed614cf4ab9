"""Flows of clients that were opened while nothing translated them.

Conntrack decides on a flow's translation with its first packet (nf_nat_inet_fn(), net/netfilter/
nf_nat_core.c). What a client opened while our table was missing stays untranslated for as long as
it sends, and our leak guard would drop every packet of it. Without its entry the next packet opens
the flow anew.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

from apagent.core.domain import Network
from apagent.core.model import FlowKey
from apagent.kernel.conntrack import any_tuples, delete_request, list_request, port_tuples
from apagent.kernel.wire import Message, Netlink

_NETLINK_NETFILTER = 12


def end_untranslated(networks: Iterable[Network]) -> int:
    """Delete the conntrack entries of these flows; how many there were. Raises KernelFault."""
    netlink = Netlink(_NETLINK_NETFILTER)
    try:
        wanted = tuple(networks)
        requests = [
            request
            for body in netlink.dump(list_request())
            if (request := _request(body, wanted)) is not None
        ]
        netlink.request(requests, ignore=frozenset({errno.ENOENT}))
    finally:
        netlink.close()
    return len(requests)


def _request(body: bytes, networks: Iterable[Network]) -> Message | None:
    tuples = port_tuples(body) or any_tuples(body)
    if tuples is None:
        return None
    reply = (tuples.reply_destination, tuples.reply_destination_port)
    if (tuples.source, tuples.source_port) != reply:
        return None
    for network in networks:
        if tuples.zone == network.zone and _leaves(tuples.source, tuples.destination, network):
            ports = tuples.source_port + tuples.destination_port
            key = FlowKey(tuples.source + tuples.destination + tuples.protocol + ports)
            return delete_request(key, network.zone)
    return None


def _leaves(source: bytes, destination: bytes, network: Network) -> bool:
    mask, prefix = int(network.prefix.netmask), int(network.prefix.network_address)
    inside = (int.from_bytes(address, "big") & mask == prefix for address in (source, destination))
    return tuple(inside) == (True, False)
