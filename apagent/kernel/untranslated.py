"""Conntrack entries of clients' flows whose packets would leave with a wrong address.

Conntrack decides on a flow's translation with its first packet (nf_nat_inet_fn(), net/netfilter/
nf_nat_core.c), and keeps to it for as long as the flow lives. Without its entry the next packet
opens the flow anew.

- What a client opened while our table was missing stays untranslated for as long as it sends, and
  our leak guard would drop every packet of it.
- A flow that we have anchored with a NAT address that can move stays translated to it when we have
  given the address up, and its packets would leave with another AP's address.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Container, Iterable

from apagent.core.domain import Network
from apagent.core.model import FlowKey
from apagent.kernel.conntrack import Tuples, any_tuples, delete_request, list_request, port_tuples
from apagent.kernel.wire import Message, Netlink

_NETLINK_NETFILTER = 12


def end_untranslated(networks: Iterable[Network]) -> int:
    """Delete the entries of flows that nothing translates; how many there were.

    Raises KernelFault.
    """
    return _end(networks, _is_untranslated)


def end_homeless(networks: Iterable[Network], here: Container[bytes]) -> int:
    """Delete the entries of flows that are translated to an address that isn't one of `here`.

    In networks with takeover only, whoever has opened them; `here` are addresses (4 bytes) of this
    machine. Returns how many there were. Raises KernelFault.
    """

    def is_homeless(tuples: Tuples) -> bool:
        return not _is_untranslated(tuples) and tuples.reply_destination not in here

    moving = [network for network in networks if network.takeover]
    return _end(moving, is_homeless, lambda tuples: (tuples, tuples.reversed()))


def _is_untranslated(tuples: Tuples) -> bool:
    reply = (tuples.reply_destination, tuples.reply_destination_port)
    return (tuples.source, tuples.source_port) == reply


def _end(
    networks: Iterable[Network],
    is_wrong: Callable[[Tuples], bool],
    ends: Callable[[Tuples], Iterable[Tuples]] = lambda tuples: (tuples,),
) -> int:
    """End what is wrong as one of an entry's `ends` has it, who is a client."""
    wanted = tuple(networks)
    if not wanted:
        return 0
    netlink = Netlink(_NETLINK_NETFILTER)
    try:
        requests = [
            request
            for body in netlink.dump(list_request())
            if (entry := port_tuples(body) or any_tuples(body)) is not None
            for tuples in ends(entry)
            if is_wrong(tuples) and (request := _request(tuples, wanted)) is not None
        ]
        netlink.request(requests, ignore=frozenset({errno.ENOENT}))
    finally:
        netlink.close()
    return len(requests)


def _request(tuples: Tuples, networks: Iterable[Network]) -> Message | None:
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
