"""Chains by which the kernel itself learns where a client is, before any claim says so.

A client's packet proves where it is: on the client interface that it is here (its address and MAC
belong together, so nobody else's packet does); out of a tunnel that it is at the AP that sent it.
What differs from the claims is noted in the map `learned` and answers go there at once, so that no
roam waits for an agent. The last packet is right. A claim takes the matter over: it puts the
address into the set `settled`, which makes what was learned before void; what is learned after it
takes the address out again.

An element's value can't be changed, only the element deleted and added; so each chain first looks
whether the value is right already, by way of the packet's priority (a scratch register, see
`ruleset`). Networks with a zone have no part in this: others share their addresses.
"""

from __future__ import annotations

from collections.abc import Iterator

from apagent.core.domain import Ap, Domain, Network
from apagent.kernel.nft import expressions as e
from apagent.kernel.nft.chain import (
    AFTER_DESTINATION_NAT,
    MANGLE,
    OUTPUT,
    PREROUTING,
    Chain,
    destination_in,
    source_in,
)
from apagent.kernel.nft.expressions import Expressions
from apagent.kernel.nft.messages import Hook
from apagent.kernel.nft.sets import (
    HERE,
    LEARNED,
    LEFT,
    SENDERS,
    SETTLED,
    WAYS,
    Names,
    anchor_value,
)

_WAY, _WAY_HERE = "way_", "here_way"
_SEEN, _SEEN_HERE = "seen_", "here_seen"
_TO_CLIENT, _ANSWER = "to_client", "answer"


def learn_here(network: Network) -> Expressions:
    """In `from_client`, of a client that isn't known here: whether it belongs here now.

    The late packets of a client that has just left prove nothing.
    """
    names = Names.of(network.name)
    pair = (*e.client_pair(), *e.in_set(names.elsewhere))
    return (*pair, *e.client_address(), *e.in_set(LEFT, negate=True), *e.jump(_SEEN_HERE))


def learn_sender(network: Network) -> Expressions:
    """In `from_tunnel`: look at where a client's packet comes from."""
    return (*source_in(network.prefix), *e.jump(Names.of(network.name).sender))


def sender(network: Network) -> Chain:
    """A client's packet out of a tunnel: learn its place if it isn't where the claims say."""
    names = Names.of(network.name)
    rules = (
        (*e.client_pair(), *e.in_set(names.places, negate=True), *e.sender_verdict(SENDERS)),
        (*_source(), *e.delete_from_map(LEARNED, anchor_value(HERE))),
    )
    return Chain(names.sender, rules)


def places(domain: Domain) -> list[Chain]:
    """For each place a chain that learns it, and one that leads packets there."""
    return [
        _seen(_SEEN_HERE, HERE),
        *(_seen(_SEEN + peer.id, peer.number) for peer in domain.peers),
        Chain(_WAY_HERE, (_if_settled(), e.set_mark(domain.here_mark, domain.mark_mask))),
        *(_way(domain, peer) for peer in domain.peers),
    ]


def senders(domain: Domain) -> dict[bytes, str]:
    """What `SENDERS` holds: tunnel MAC -> the chain that learns its AP."""
    return {_mac(peer): _SEEN + peer.id for peer in domain.peers}


def ways(domain: Domain) -> dict[bytes, str]:
    """What `WAYS` holds: place -> the chain that leads there."""
    here = {anchor_value(HERE): _WAY_HERE}
    return here | {anchor_value(peer.number): _WAY + peer.id for peer in domain.peers}


def to_clients(domain: Domain) -> list[Chain]:
    """Packets to clients, and what we answer them ourselves, go where they were last seen.

    After any DNAT: an anchor's replies have the client's address by then. What we send ourselves
    never goes to another AP that way: its mark would lead it into any network's tunnel
    (`rules.wanted_rules`).
    """
    networks = [network for network in domain.networks if not network.zone]
    learned = (*e.destination_address(), *e.priority_from(LEARNED))
    here = (*e.priority_is(anchor_value(HERE)), *e.jump(_WAY_HERE))
    # Each is one rule, which ends at once where nothing is learned, that is nearly always.

    def entrance(chain: str) -> Iterator[Expressions]:
        return ((*destination_in(network.prefix), *e.jump(chain)) for network in networks)

    return [
        Chain(_TO_CLIENT, ((*learned, *e.priority_verdict(WAYS)),)),
        Chain(_ANSWER, ((*learned, *here),)),
        Chain(
            "learned_ways",
            tuple(entrance(_TO_CLIENT)),
            Hook("filter", PREROUTING, AFTER_DESTINATION_NAT),
        ),
        Chain("learned_answers", tuple(entrance(_ANSWER)), Hook("route", OUTPUT, MANGLE)),
    ]


def _seen(chain: str, number: int) -> Chain:
    """Note the place of the packet's sender, over whatever was noted or settled before."""
    value = anchor_value(number)
    return Chain(
        chain,
        (
            (*_source(), *e.delete_from_set(SETTLED)),
            (*_source(), *e.priority_from(LEARNED)),
            (
                *e.priority_is(value, negate=True),
                *_source(),
                *e.delete_from_map(LEARNED, value),
            ),
            (*_source(), *e.update_map(LEARNED, value)),
            e.set_priority(0),
        ),
    )


def _way(domain: Domain, peer: Ap) -> Chain:
    """Lead packets to `peer`: but not out of a tunnel into it again, where routes alone decide.

    Else two APs that have learned of each other would play a packet to and fro.
    """
    return Chain(
        _WAY + peer.id,
        (
            (*e.iifname_begins(domain.device_prefix), *e.return_()),
            _if_settled(),
            e.set_mark(domain.mark(peer), domain.mark_mask),
        ),
    )


def _if_settled() -> Expressions:
    return (*e.destination_address(), *e.in_set(SETTLED), *e.return_())


def _source() -> Expressions:
    return (*e.ipv4(), *e.client_address())


def _mac(peer: Ap) -> bytes:
    return bytes.fromhex(peer.tunnel_mac.replace(":", ""))
