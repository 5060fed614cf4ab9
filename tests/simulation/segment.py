"""The segment that the APs' uplinks are on: who has which NAT address, by ARP; and adoptions.

What an agent asks for here it learns later, in the order of its own turns, as `AnchorWork` does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from apagent.core.domain import tunnel_mac
from apagent.core.effects import AdoptFlows, DefendAddress, ProbeAddress
from apagent.core.events import AddressConflict, AddressProbed, Event, FlowsAdopted
from apagent.core.model import ApId, FlowKey, Mac, NatAddress, NetworkName

if TYPE_CHECKING:
    from ipaddress import IPv4Address

    from tests.simulation.node import Agent, Node

UNKNOWN_USER = Mac("00:00:00:00:00:00")


class Segment:
    """All APs' uplinks. `opener` says whose a flow is, and notes that the node translates it."""

    def __init__(
        self, nodes: dict[ApId, Node], opener: Callable[[Node, NetworkName, FlowKey], Mac]
    ) -> None:
        self._nodes = nodes
        self._opener = opener

    def carry_out(self, node: Node, effect: ProbeAddress | DefendAddress | AdoptFlows) -> None:
        """Do what the node's agent wants."""
        assert node.agent is not None
        match effect:
            case ProbeAddress():
                node.agent.asked[effect.nat] = self._user(node, effect.nat)
            case DefendAddress():
                if node.kernel.has(effect.nat.address):
                    self._announce(node, effect.nat)
            case AdoptFlows():
                network = effect.nat.network
                adopt = node.kernel.conntrack.adopt
                left_out = frozenset(
                    key
                    for key, nat in effect.sessions.items()
                    if not adopt(network, key, nat, self._opener(node, network, key))
                )
                node.agent.done.append(FlowsAdopted(effect.nat, effect.sessions, left_out))

    def conclude(self, node: Node) -> Iterator[Event]:
        """The time to answer is over."""
        assert node.agent is not None
        asked, node.agent.asked = node.agent.asked, {}
        for nat, user in asked.items():
            yield AddressProbed(nat, user or self._user(node, nat))

    def announce_new(self, node: Node, before: set[tuple[NetworkName, IPv4Address]]) -> None:
        """Addresses that have come to the node's uplink since `before` are announced there."""
        for network, address in sorted(node.kernel.copy_addresses() - before):
            self._announce(node, NatAddress(network, address))

    def _announce(self, node: Node, nat: NatAddress) -> None:
        for other in self._others(node):
            if other.agent is None:
                continue
            if nat in other.agent.asked:
                other.agent.asked[nat] = tunnel_mac(node.id)
            elif other.kernel.has(nat.address) or self._is_about_to_take(other.agent, nat):
                other.agent.done.append(AddressConflict(nat, tunnel_mac(node.id)))

    @staticmethod
    def _is_about_to_take(agent: Agent, nat: NatAddress) -> bool:
        """It may have the address by the time it reads what is said of it now."""
        mine = agent.engine.anchoring.book.mine
        return nat in mine.ready or nat in mine.taking

    def _user(self, node: Node, nat: NatAddress) -> Mac | None:
        if not node.kernel.uplink_works:
            return UNKNOWN_USER
        users = [o for o in self._others(node) if o.kernel.has(nat.address)]
        return tunnel_mac(users[0].id) if users else None

    def _others(self, node: Node) -> list[Node]:
        """The APs that hear the node, and that it hears."""
        if not node.kernel.uplink_works:
            return []
        others = (o for o in self._nodes.values() if o is not node)
        return [o for o in others if o.powered and o.kernel.uplink_works]
