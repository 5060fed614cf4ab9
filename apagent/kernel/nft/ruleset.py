"""The static nftables ruleset of a roam domain, as data: chains, rules, maps, counters.

Static means: a function of the `Domain` alone. What changes with every flow and every roam stands
in the maps and sets (`elements`), which the rules only name. In nft's words, for a network `lan`:

    map lan_flows { typeof ip saddr . ip daddr . meta l4proto . th sport . th dport : … priority }
    map lan_echoes { typeof ip saddr . ip daddr . icmp id : meta priority }
    map lan_sockets { type ipv4_addr . inet_proto . inet_service : classid }
    set lan_known { type ipv4_addr . ether_addr }
    set lan_home { type ipv4_addr . ether_addr }
    set lan_elsewhere { type ipv4_addr . ether_addr }
    set lan_places { type ipv4_addr . ether_addr }
    set lan_arrived { type ipv4_addr; timeout 500ms }
    map lan_anchors { type classid : verdict; elements = { 6170:2 : goto anchor_ap2 } }
    map lan_new_anchor { type classid : verdict }
    map lan_sources { type ifname : ipv4_addr }
    map lan_forwards { type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service }
    map learned { type ipv4_addr : classid; flags dynamic,timeout; timeout 300ms }
    map ways { type classid : verdict; elements = { 6170:2 : goto way_ap2 } }

The packet's priority serves as scratch register: the lookups leave the anchor's value there, and
ip_forward() overwrites it later. A socket is looked up where no map knows the exact flow.

To interpret an expression takes some 8 ns, to compare an interface's name 40. So rules begin with
what is cheap and ends them for most packets.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import chain as flatten

from apagent.core.domain import Domain
from apagent.kernel.nft import forwarding, learning, prerouting
from apagent.kernel.nft.chain import Chain, PackedRules
from apagent.kernel.nft.forwarding import LEAKED, RESET
from apagent.kernel.nft.messages import SetDefinition
from apagent.kernel.nft.sets import (
    SENDERS,
    WAYS,
    Names,
    anchor_chain,
    anchor_value,
    definitions,
)


@dataclass(frozen=True)
class Ruleset:
    """All that should be in the table, but for the dynamic elements."""

    domain: Domain

    @cached_property
    def chains(self) -> dict[str, Chain]:
        """By name, each before those that jump to it."""
        domain = self.domain
        chains = [
            *(prerouting.anchor(domain, peer) for peer in domain.peers),
            *learning.places(domain),
            *flatten.from_iterable(
                (
                    prerouting.new(network),
                    prerouting.unknown(domain, network),
                    prerouting.inside(network),
                    prerouting.icmp(network),
                    prerouting.from_client(domain, network),
                    learning.sender(network),
                    prerouting.from_tunnel(network),
                    forwarding.stray(network),
                )
                for network in domain.networks
            ),
            prerouting.prerouting(domain),
            *prerouting.zones(domain),
            *learning.to_clients(domain),
            forwarding.mss_clamp(domain),
            forwarding.opening(domain),
            forwarding.forward(domain),
            *prerouting.own_errors(domain),
            *prerouting.port_forwards(domain),
            forwarding.source_nat(domain),
            forwarding.leak_guard(domain),
        ]
        return {chain.name: chain for chain in chains}

    @cached_property
    def rules(self) -> dict[str, PackedRules]:
        """Each chain's rules for the kernel, by the chain's name."""
        return {name: chain.packed(self.domain.table) for name, chain in self.chains.items()}

    @cached_property
    def sets(self) -> dict[str, SetDefinition]:
        """Sets and maps by name."""
        return definitions(self.domain)

    @cached_property
    def anchors(self) -> dict[str, dict[bytes, str]]:
        """The elements of each network's anchor map in quiet times: anchor's value -> its chain."""
        elements = {anchor_value(peer.number): anchor_chain(peer.id) for peer in self.domain.peers}
        return {Names.of(network.name).anchors: elements for network in self.domain.networks}

    @cached_property
    def places(self) -> dict[str, dict[bytes, str]]:
        """The elements of the other verdict maps, which never change: key -> chain."""
        return {SENDERS: learning.senders(self.domain), WAYS: learning.ways(self.domain)}

    @property
    def counters(self) -> tuple[str, ...]:
        """Named counters: they live on when rules are replaced."""
        return (LEAKED, RESET)
