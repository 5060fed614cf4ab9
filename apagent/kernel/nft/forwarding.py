"""Chains from routing on: what may be forwarded, how it is translated, what may leave."""

from __future__ import annotations

from collections.abc import Iterator

from apagent.core.domain import Domain, Network
from apagent.core.model import TCP
from apagent.kernel.nft import expressions as e
from apagent.kernel.nft.chain import (
    FORWARD,
    LAST,
    MANGLE,
    POSTROUTING,
    SOURCE_NAT,
    Chain,
    destination_in,
    leaving,
    source_in,
)
from apagent.kernel.nft.expressions import Expressions
from apagent.kernel.nft.messages import Hook
from apagent.kernel.nft.sets import UNSYNCED, Names

LEAKED, RESET = "leaked_packets", "reset_packets"
"""Names of the counters (`reset` alone is a word of nft's grammar)."""
FOLLOW_TTL = 3
"""What is left of a packet's life when it follows a client from its former AP to the next one.

Two APs that each believe the other to serve a client would send its packets to and fro until their
TTL is spent: at most this often instead.
"""


def mss_clamp(domain: Domain) -> Chain:
    """Make every TCP connection of a client fit the tunnel that it may need one day."""
    clamp = e.set_mss(domain.mss)
    rules: list[Expressions] = []
    for network in domain.networks:
        rules += [
            (*source_in(network.prefix), *clamp),
            (*destination_in(network.prefix), *clamp),
        ]
    return Chain("mss_clamp", tuple(rules))


def forward(domain: Domain) -> Chain:
    """The MSS clamp, from birth and in both directions, and what may not be forwarded as it is.

    That is: what `opening` finds, and what has followed its client from AP to AP often enough.
    """
    syn = (*e.l4proto(TCP), *e.tcp_flags(e.SYN | e.RST, e.SYN))
    rules: list[Expressions] = [
        (*syn, *e.jump("mss_clamp")),
        *_established(domain),
        (*e.ct_state_opening(), *e.jump("opening")),
    ]
    for network in domain.networks:
        rules += [
            *_following(domain.device(network)),
            *_crossing(domain, network),
            *(_isolation(domain, network) if network.isolate_clients else ()),
        ]
    return Chain("forward", tuple(rules), Hook("filter", FORWARD, MANGLE))


def opening(domain: Domain) -> Chain:
    """Packets that conntrack sees as no known flow's: what goes to an anchor isn't among them.

    Those that would open a flow but can't be its first don't go on, nor what may be a peer's while
    we are not in sync. Conntrack takes data of a connection that it doesn't know for a new flow,
    but its end (FIN) for invalid.
    """
    ending = (*e.l4proto(TCP), *e.tcp_flags(e.FIN | e.RST, 0, negate=True))
    strays = ((*e.ct_state_new(), *e.not_first_of_tcp()), (*e.ct_state_invalid(), *ending))
    rules: list[Expressions] = []
    for network in domain.networks:
        judge = Names.of(network.name).stray
        unsynced = (*e.iifname_in(UNSYNCED), *e.ct_state_new(), *e.l4proto(TCP, negate=True))
        rules += [
            *(
                (*e.iifname(iif), *leaving(network), *kind, *e.jump(judge))
                for iif in (network.client_interface, domain.device(network))
                for kind in strays
            ),
            (*leaving(network), *unsynced, *e.drop()),
            *(_reported(network) if network.takeover else ()),
        ]
    return Chain("opening", tuple(rules))


def _established(domain: Domain) -> Iterator[Expressions]:
    """Packets of flows that go on have passed: the rest isn't for them.

    They are nearly all packets, and each would pay for every rule by itself. What two networks, or
    clients that are kept apart, may not send each other is told by interfaces: where there are such
    rules, only packets to and from the uplinks have passed. Where there are none, the rest is for
    new flows and for what conntrack doesn't see.
    """
    if len(domain.networks) == 1 and not domain.networks[0].isolate_clients:
        yield (*e.ct_state_established(), *e.return_())
        return
    for uplink in dict.fromkeys(network.uplink for network in domain.networks):
        yield (*e.ct_state_established(), *e.oifname(uplink), *e.return_())
        yield (*e.ct_state_established(), *e.iifname(uplink), *e.return_())


def _reported(network: Network) -> Iterator[Expressions]:
    """Of a flow that another AP may continue, conntrack reports when it is established.

    Who listens to that hears of every change of every connection else, five or so a flow.
    """
    yield (*e.ct_state_new(), *source_in(network.prefix), *e.set_events())
    yield (*e.ct_state_new(), *destination_in(network.prefix), *e.set_events())


def stray(network: Network) -> Chain:
    """A TCP packet in mid-connection that matches no flow here: reset, so that nobody hangs.

    Unless its session may still be on its way: a client that we don't know to be here yet, or one
    that has just come. TCP repeats what is dropped.
    """
    names = Names.of(network.name)
    client_interface = e.iifname(network.client_interface)
    unknown = (*e.client_pair(), *e.in_set(names.known, negate=True))
    arrived = (*e.ipv4(), *e.client_address(), *e.in_set(names.arrived))
    return Chain(
        names.stray,
        (
            (*client_interface, *unknown, *e.drop()),
            (*client_interface, *arrived, *e.drop()),
            (*e.l4proto(TCP), *e.counter(RESET), *e.reject_with_reset()),
        ),
    )


def _following(device: str) -> Iterator[Expressions]:
    """Packets that come out of the tunnel and go back into it: their client has moved on.

    The forward hook sees the TTL after it was lowered by one (ip_forward()).
    """
    again = (*e.iifname(device), *e.oifname(device))
    yield (*again, *e.ttl_below(2), *e.drop())
    yield (*again, *e.ttl_above(FOLLOW_TTL), *e.set_ttl(FOLLOW_TTL))


def _crossing(domain: Domain, network: Network) -> Iterator[Expressions]:
    """No tunnel leads from a network to another: that way firewalls on both ends let it pass.

    Between two bridges of one AP its firewall decides.
    """
    tunnel = domain.device(network)
    for other in domain.others(network):
        clients, their_tunnel = other.client_interface, domain.device(other)
        yield (*e.iifname(network.client_interface), *e.oifname(their_tunnel), *e.drop())
        yield (*e.iifname(tunnel), *e.oifname(clients), *e.drop())
        yield (*e.iifname(tunnel), *e.oifname(their_tunnel), *e.drop())


def _isolation(domain: Domain, network: Network) -> Iterator[Expressions]:
    clients, tunnel = network.client_interface, domain.device(network)
    yield (*e.iifname(clients), *e.oifname(tunnel), *destination_in(network.prefix), *e.drop())
    yield (*e.iifname(clients), *e.oifname(clients), *destination_in(network.prefix), *e.drop())
    yield (*e.iifname(tunnel), *e.oifname(clients), *source_in(network.prefix), *e.drop())


def source_nat(domain: Domain) -> Chain:
    """Translate what leaves an uplink with a client's address.

    A flow keeps what its first packet was given, also when the sources change.
    """
    rules = tuple(
        (
            *leaving(network),
            *(e.ct_original_zone(network.zone) if network.zone else ()),
            *translation,
        )
        for network in domain.networks
        for translation in _translations(network)
    )
    return Chain("srcnat", rules, Hook("nat", POSTROUTING, SOURCE_NAT))


def _translations(network: Network) -> tuple[Expressions, ...]:
    """How new flows are translated, in the order of preference."""
    if network.takeover:
        return (e.snat_from(Names.of(network.name).sources), e.masquerade())
    return (e.snat(network.nat_address) if network.nat_address else e.masquerade(),)


def leak_guard(domain: Domain) -> Chain:
    """The leak guard: count and drop what would still leave an uplink with a client's address.

    And the mark of what enters a tunnel is taken off, now that it is routed: the outer packet
    inherits it, and a policy router that marks clients' packets (mwan3, pbr) would send the outer
    one along with them instead of to the peer.
    """
    leaked = (
        (*source_in(n.prefix), *e.oifname(n.uplink), *e.counter(LEAKED), *e.drop())
        for n in domain.networks
    )
    into_tunnel = (
        (*e.marked(), *e.oifname(domain.device(n)), *e.clear_mark()) for n in domain.networks
    )
    return Chain("leak_guard", (*leaked, *into_tunnel), Hook("filter", POSTROUTING, LAST))
