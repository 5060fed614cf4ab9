"""Port forwards as standing sessions, and which of them an AP has where NAT addresses move.

A standing session tells all that a port forward is: its key the client's socket, its translation
the NAT address and port that the outside sees. So whoever knows an anchor's sessions can go on with
its forwards, too. In networks with takeover they belong to their NAT address: who holds it forwards
its ports and says so. Of an address whose home we are, our configuration has the forwards; those of
another AP's are learned from who anchored its flows, and after a restart from our kernel.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from ipaddress import IPv4Address

from apagent.core.domain import Network
from apagent.core.model import (
    NAT_ADDRESS,
    TRANSLATION,
    UNKNOWN_NAT,
    FlowKey,
    Nat,
    Sessions,
    SocketKey,
    is_standing,
    socket_of,
    standing_of,
)

Forwards = Mapping[SocketKey, SocketKey]
"""What the outside sees (NAT address, protocol, port) -> the client's socket."""


def standing_sessions(forwards: Forwards) -> dict[FlowKey, Nat]:
    """The sessions that say these forwards.

    Several may lead to the same socket, by different ports or addresses. The number that tells them
    apart begins at the port.
    """
    sessions: dict[FlowKey, Nat] = {}
    for outside, inside in sorted(forwards.items()):
        number = int.from_bytes(outside[5:], "big")
        while (key := standing_of(inside, number)) in sessions:
            number = (number + 1) & 0xFFFF
        sessions[key] = Nat(outside[:4] + outside[5:] + UNKNOWN_NAT[TRANSLATION.stop :])
    return sessions


def outside_of(key: FlowKey, nat: Nat) -> SocketKey:
    """What the outside sees of the client's end of a flow."""
    return SocketKey(nat[NAT_ADDRESS] + key[8:9] + nat[TRANSLATION][4:])


def forwards_of(address: IPv4Address, sessions: Sessions) -> dict[SocketKey, SocketKey]:
    """The forwards of a NAT address that these sessions say."""
    return {
        outside_of(key, nat): socket_of(key)
        for key, nat in sessions.items()
        if nat[NAT_ADDRESS] == address.packed and is_standing(key)
    }


class MovingForwards:
    """The forwards of one network with takeover, as far as this AP has to do with them."""

    def __init__(self, network: Network) -> None:
        self._home = network.nat_address
        self._ours = network.forwarded
        self._learned: dict[IPv4Address, Forwards] = {}
        self.adopted: frozenset[IPv4Address] = frozenset()
        """Addresses whose forwards an earlier run of ours has left in the kernel."""

    def adopt(self, installed: Forwards) -> None:
        """Take over what an earlier run has left in the kernel."""
        for outside, inside in installed.items():
            address = IPv4Address(outside[:4])
            self._learned[address] = {**self._learned.get(address, {}), outside: inside}
        self.adopted = frozenset(self._learned)

    def learn(self, address: IPv4Address, sessions: Sessions) -> None:
        """We are about to take an address from the AP whose sessions these are."""
        self._learned[address] = forwards_of(address, sessions)

    def of(self, addresses: Collection[IPv4Address]) -> dict[SocketKey, SocketKey]:
        """The forwards of these addresses."""
        found: dict[SocketKey, SocketKey] = {}
        for address in sorted(addresses):
            found |= self._ours if address == self._home else self._learned.get(address, {})
        return found

    def let_in(self, address: IPv4Address, sessions: Sessions) -> frozenset[FlowKey]:
        """Which of these flows, all translated to the address, its forwards have let in."""
        forwards = self.of({address})
        if not forwards:
            return frozenset()
        return frozenset(
            key
            for key, nat in sessions.items()
            if forwards.get(outside_of(key, nat)) == socket_of(key)
        )

    def forget_others(self, addresses: Collection[IPv4Address]) -> None:
        """We have to do with no other addresses."""
        for address in self._learned.keys() - addresses:
            del self._learned[address]

    def foreign(self) -> set[IPv4Address]:
        """The addresses of other APs of which we know forwards."""
        return {a for a, learned in self._learned.items() if learned and a != self._home}
