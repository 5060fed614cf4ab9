"""Chains before routing: which anchor a packet belongs to, and which network a reply."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from apagent.core.domain import Ap, Domain, Network
from apagent.core.model import ICMP, TCP, UDP
from apagent.kernel.nft import expressions as e
from apagent.kernel.nft import learning
from apagent.kernel.nft.chain import (
    DESTINATION_NAT,
    MANGLE,
    OUTPUT,
    PREROUTING,
    RAW,
    Chain,
    destination_in,
    source_in,
)
from apagent.kernel.nft.expressions import Expressions
from apagent.kernel.nft.messages import Hook
from apagent.kernel.nft.sets import ANY_VALUE, UNSYNCED, Names, anchor_chain, any_anchor

DSTNAT = "dstnat"
"""The chain of port forwards."""
_DATA_TRIGGER_RATE, _DATA_TRIGGER_BURST = 100, 50
_DATA_TRIGGER_SNAPLEN = 64
"""Bytes of a packet that are reported: enough for the IPv4 header."""


def prerouting(domain: Domain) -> Chain:
    """The entrance: every packet from a client or out of a tunnel goes by its network's chain.

    Nearly all are of clients at home, and done with first.
    """
    rules: list[Expressions] = [_from_home(domain, network) for network in domain.networks]
    for network in domain.networks:
        names = Names.of(network.name)
        rules += [
            (*e.iifname(network.client_interface), *e.goto(names.from_client)),
            (*e.iifname(domain.device(network)), *e.goto(names.from_tunnel)),
        ]
    rules.append(_untracked_tunnel(domain, e.DESTINATION_ADDRESS))
    return Chain("prerouting", tuple(rules), Hook("filter", PREROUTING, RAW))


def _from_home(domain: Domain, network: Network) -> Expressions:
    """What a client at home sends to the Internet goes on as on any NATing AP.

    But not its ICMP errors: they may speak of a flow of another address. To compare interfaces'
    names takes longer than addresses; it is done where another network's client could have the
    same pair.
    """
    here = (
        e.iifname(network.client_interface) if domain.others(network) else source_in(network.prefix)
    )
    return (
        *here,
        *e.client_pair(),
        *e.in_set(Names.of(network.name).home),
        *destination_in(network.prefix, negate=True),
        *e.l4proto(ICMP, negate=True),
        *chain(*_into_zone(network)),
        *e.return_(),
    )


def _untracked_tunnel(domain: Domain, our_address: int) -> Expressions:
    """Outer packets of the tunnel take no part in conntrack.

    Each flow in the tunnel has a source port of its own (vxlan_xmit()), and would take a second
    entry; and a full table would stop the tunnel.
    """
    return (
        *e.address_is(our_address, domain.me.underlay),
        *e.l4proto(UDP),
        *e.destination_port(domain.tunnel_port),
        *e.notrack(),
    )


def from_client(domain: Domain, network: Network) -> Chain:
    """Find the anchor of a client's packet."""
    names = Names.of(network.name)
    return Chain(
        names.from_client,
        (
            *_forged(domain, network),
            (*source_in(network.prefix, negate=True), *e.return_()),
            (*e.client_pair(), *e.in_set(names.known, negate=True), *e.jump(names.unknown)),
            (*destination_in(network.prefix), *e.goto(names.inside)),
            (*e.ipv4(), *e.set_priority(ANY_VALUE)),
            (*e.ipv4(), *e.client_flow(), *e.priority_from(names.flows)),
            (*e.l4proto(ICMP), *e.jump(names.icmp)),
            (
                *e.priority_is(any_anchor()),
                *e.ipv4(),
                *e.client_socket(),
                *e.priority_from(names.sockets),
            ),
            e.priority_verdict(names.anchors),
            *_into_zone(network),
        ),
    )


def inside(network: Network) -> Chain:
    """A client's packet to an address of its own network: the gateway's, or another client's."""
    to_gateway = e.address_is(e.DESTINATION_ADDRESS, network.gateway)
    return Chain(
        Names.of(network.name).inside,
        (
            (*to_gateway, *chain(*_into_zone(network)), *e.return_()),
            (*e.notrack(), *e.accept()),
        ),
    )


def icmp(network: Network) -> Chain:
    """Of an echo request the anchor is that of its identifier, of an error that of its flow."""
    names = Names.of(network.name)
    message = (*e.ipv4(), *e.l4proto(ICMP))
    return Chain(
        names.icmp,
        (
            (
                *message,
                *e.icmp_echo_request(),
                *e.client_echo(),
                *e.priority_from(names.echoes),
            ),
            (
                *message,
                *e.icmp_echo_request(negate=True),
                *e.flow_of_client_error(),
                *e.priority_from(names.flows),
            ),
        ),
    )


def new(network: Network) -> Chain:
    """Send a client's packet that no map knows to the AP that anchors new flows in our place.

    What is for this AP stays here. What we would hold back here isn't let out there either: a
    packet whose session may still be on its way would be given a second anchor, or be reset.
    """
    names = Names.of(network.name)
    stranger = (*e.client_pair(), *e.in_set(names.known, negate=True))
    arrived = (*e.ipv4(), *e.client_address(), *e.in_set(names.arrived))
    return Chain(
        names.new,
        (
            (*e.to_unicast_address(negate=True), *e.return_()),
            (*e.iifname_in(UNSYNCED), *e.l4proto(TCP, negate=True), *e.drop()),
            (*e.not_first_of_tcp(), *stranger, *e.drop()),
            (*e.not_first_of_tcp(), *arrived, *e.drop()),
            e.priority_verdict(names.new_anchor),
        ),
    )


def unknown(domain: Domain, network: Network) -> Chain:
    """A client that isn't known here: report it, and believe it if it is known elsewhere."""
    report = (
        *e.limit_per_second(_DATA_TRIGGER_RATE, _DATA_TRIGGER_BURST),
        *e.log(domain.nflog_group, _DATA_TRIGGER_SNAPLEN),
    )
    learn = () if network.zone else (learning.learn_here(network),)
    return Chain(Names.of(network.name).unknown, (*learn, report))


def _forged(domain: Domain, network: Network) -> Iterator[Expressions]:
    """A client with an address of another network would open a session in that one's name."""
    for other in domain.others(network):
        if not other.prefix.overlaps(network.prefix):
            yield (*source_in(other.prefix), *e.drop())


def anchor(domain: Domain, peer: Ap) -> Chain:
    """Send a packet to the anchor `peer`, untranslated."""
    return Chain(
        anchor_chain(peer.id),
        (e.set_mark(domain.mark(peer), domain.mark_mask), e.notrack(), e.accept()),
        number=peer.number,
    )


def from_tunnel(network: Network) -> Chain:
    """What comes out of a tunnel begins without a mark.

    It still has the outer packet's (vxlan_rcv()), which a policy router may have marked as traffic
    between APs: the client's flow would leave by another uplink than before.
    """
    to_client = (*destination_in(network.prefix), *e.notrack(), *e.accept())
    learn = () if network.zone else (learning.learn_sender(network),)
    rules = (e.clear_mark(), *learn, to_client, *_into_zone(network))
    return Chain(Names.of(network.name).from_tunnel, rules)


def _into_zone(network: Network) -> tuple[Expressions, ...]:
    """Keep a client's flows apart from those of another network with the same addresses."""
    return (e.set_original_zone(network.zone),) if network.zone else ()


def zones(domain: Domain) -> list[Chain]:
    """Marks for replies that come in from the uplink, and for what we answer ourselves."""
    if not any(network.zone for network in domain.networks):
        return []
    replies = tuple(_zone_marks(domain, received=True))
    answers = tuple(_zone_marks(domain, received=False))
    return [
        Chain("zone_replies", replies, Hook("filter", PREROUTING, MANGLE)),
        Chain("zone_answers", answers, Hook("route", OUTPUT, MANGLE)),
    ]


def _zone_marks(domain: Domain, *, received: bool) -> Iterator[Expressions]:
    """Tell the packets to a network with a zone, by a mark for its policy rule."""
    for network in domain.networks:
        if network.zone:
            yield (
                *(e.iifname(network.uplink) if received else ()),
                *e.ct_original_zone(network.zone),
                *e.set_mark(domain.zone_mark(network), domain.mark_mask),
            )


def port_forwards(domain: Domain) -> list[Chain]:
    """Port forwards, before a firewall's own DNAT at -100.

    Those of addresses that move are in a map, which has those of the addresses that are here.
    """
    rules = tuple(rule for network in domain.networks for rule in _forwards(network))
    return [Chain(DSTNAT, rules, Hook("nat", PREROUTING, DESTINATION_NAT))] if rules else []


def _forwards(network: Network) -> Iterator[Expressions]:
    if network.lets_forwards_move:
        yield (*e.iifname(network.uplink), *e.dnat_from(Names.of(network.name).forwards))
        return
    for forward in network.forwards:
        yield (
            *e.iifname(network.uplink),
            *(
                e.address_is(e.DESTINATION_ADDRESS, network.nat_address)
                if network.nat_address
                else e.to_local_address()
            ),
            *e.ipv4(),
            *e.l4proto(forward.protocol),
            *e.destination_port(forward.port),
            *e.dnat(forward.client, forward.client_port),
        )


def own_errors(domain: Domain) -> list[Chain]:
    """ICMP errors of our own about what came out of a tunnel go back to the flow's anchor.

    Only the anchor can translate them to what the server knows. The lookup is for these errors
    alone: the tunnel's outer packet inherits the priority in which it leaves its result.
    """
    error = (*e.ipv4(), *e.l4proto(ICMP), *e.icmp_echo_request(negate=True))
    chains = [
        Chain(
            names.own_error,
            (
                (*e.flow_of_client_error(), *e.priority_from(names.flows)),
                e.priority_verdict(names.anchors),
            ),
        )
        for names in (Names.of(network.name) for network in domain.networks)
    ]
    rules = tuple(
        (*error, *e.oifname(network.uplink), *e.jump(Names.of(network.name).own_error))
        for network in domain.networks
    )
    tunnel = _untracked_tunnel(domain, e.SOURCE_ADDRESS)
    return [*chains, Chain("output", (*rules, tunnel), Hook("route", OUTPUT, RAW))]
