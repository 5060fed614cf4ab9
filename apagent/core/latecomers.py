"""Flows of an address that has moved, of which its former holder tells when the others have gone.

What comes to forwarded ports opens flows there until the holder has let go, and conntrack tells it
of any flow with some delay. So whoever takes an address watches what the others say: a flow that is
translated to it belongs here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from ipaddress import IPv4Address
from operator import itemgetter

from apagent.core.model import (
    NAT_ADDRESS,
    FlowKey,
    Nat,
    NatAddress,
    NetworkName,
    SessionChanges,
    Sessions,
    is_standing,
)

_ADDRESS: Callable[[Nat], bytes] = itemgetter(NAT_ADDRESS)
"""The translation's address, without a call of Python."""


class Latecomers:
    """Such flows of all networks, until they are taken in."""

    def __init__(self, networks: Iterable[NetworkName]) -> None:
        self._watched: dict[NetworkName, dict[bytes, NatAddress]] = {name: {} for name in networks}
        self._found: dict[NatAddress, dict[FlowKey, Nat]] = {}

    def watch(self, network: NetworkName, addresses: Collection[IPv4Address]) -> None:
        """The addresses of a network that are ours, or coming; what was found of others goes."""
        self._watched[network] = {a.packed: NatAddress(network, a) for a in addresses}
        for nat in [nat for nat in self._found if nat.network == network]:
            if nat.address not in addresses:
                del self._found[nat]

    def hear(self, network: NetworkName, changes: SessionChanges) -> bool:
        """Take in what a peer says of its flows; returns whether some belong here."""
        watched = self._watched[network]
        if not watched:
            return False
        for found in self._found.values():
            for key in found.keys() & changes.keys():
                del found[key]
        # Every flow of every peer comes by, and nearly none belongs here.
        if watched.keys().isdisjoint(map(_ADDRESS, filter(None, changes.values()))):
            return False
        for key, nat in changes.items():
            if nat is not None and nat[NAT_ADDRESS] in watched and not is_standing(key):
                self._found.setdefault(watched[nat[NAT_ADDRESS]], {})[key] = nat
        return True

    def take(self, address: NatAddress) -> Sessions:
        """What was found of an address, once."""
        return self._found.pop(address, {})

    def waiting(self) -> list[NatAddress]:
        """The addresses of which something was found."""
        return sorted(self._found)
