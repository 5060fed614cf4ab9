"""The static nftables ruleset of a roam domain, as data: chains, rules, maps, counters.

Static means: a function of the `Domain` alone. What changes with every flow and every roam stands
in the maps and sets (`elements`), which the rules only name. In nft's words, for a network `lan`:

    map lan_flows { typeof ip saddr . ip daddr . meta l4proto . th sport . th dport : … priority }
    map lan_echoes { typeof ip saddr . ip daddr . icmp id : meta priority }
    map lan_sockets { type ipv4_addr . inet_service : classid }
    set lan_elsewhere { type ipv4_addr }
    map lan_anchors { type classid : verdict; elements = { 6170:2 : goto anchor_ap2 } }

The packet's priority serves as scratch register: the lookups leave the anchor's value there, and
ip_forward() overwrites it later. The exact flow is looked up after the socket, so it wins.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from ipaddress import IPv4Network
from itertools import chain as flatten

from apagent.core.domain import ANCHOR_TAG, Ap, Domain, Network
from apagent.core.model import ICMP, TCP, UDP, ApId, NetworkName
from apagent.kernel.nft import expressions as e
from apagent.kernel.nft.elements import ADDRESS_SIZE, ECHO_SIZE, FLOW_SIZE, SOCKET_SIZE
from apagent.kernel.nft.expressions import Expressions
from apagent.kernel.nft.messages import VERDICT, Hook, SetDefinition, new_rule
from apagent.kernel.nft.userdata import ByteOrder, byte_orders, echo_map
from apagent.kernel.wire import Message

ANCHOR_CHAIN = "anchor_"
LEAKED, RESET = "leaked_packets", "reset_packets"
"""Names of the counters (`reset` alone is a word of nft's grammar)."""

_RAW, _MANGLE, _SOURCE_NAT, _LAST = -300, -150, 90, 300
"""Hook priorities (linux/netfilter_ipv4.h). Source NAT comes before a firewall's own at 100, so
that ours decides; the leak guard comes after every NAT."""
_PREROUTING, _FORWARD, _POSTROUTING = 0, 2, 4
"""NF_INET_PRE_ROUTING, NF_INET_FORWARD, NF_INET_POST_ROUTING (linux/netfilter.h)."""

_DATA_TRIGGER_RATE, _DATA_TRIGGER_BURST = 100, 50
_DATA_TRIGGER_SNAPLEN = 64
"""Bytes of a packet that are reported: enough for the IPv4 header."""

_IPV4_ADDR, _INTEGER, _INET_PROTO, _INET_SERVICE, _CLASSID = 7, 4, 12, 13, 23
"""nft's data types (nftables, include/datatype.h)."""
_VERDICT_LENGTH = 16
_BITS_PER_TYPE = 6

_U32 = struct.Struct("=I")


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain and all its rules; with a hook it is a base chain."""

    name: str
    rules: tuple[Expressions, ...]
    hook: Hook | None = None

    def messages(self, table: str) -> list[Message]:
        """Requests that append the rules; the first carries the fingerprint as its comment."""
        mark = self.fingerprint(table)
        return [
            new_rule(table, self.name, rule, "" if i else mark) for i, rule in enumerate(self.rules)
        ]

    def fingerprint(self, table: str) -> str:
        """What tells these rules from others: a restart leaves a chain alone that carries it."""
        bodies = (new_rule(table, self.name, rule).body for rule in self.rules)
        return f"apagent {sha256(b''.join(bodies)).hexdigest()[:16]}"


@dataclass(frozen=True, slots=True)
class Names:
    """What a network's sets, maps and chains are called."""

    flows: str
    echoes: str
    sockets: str
    elsewhere: str
    anchors: str
    from_client: str
    from_tunnel: str

    @classmethod
    def of(cls, network: NetworkName) -> Names:
        """The names for `network`."""
        fields = cls.__slots__
        return cls(*(f"{network}_{field}" for field in fields))


@dataclass(frozen=True)
class Ruleset:
    """All that should be in the table, but for the dynamic elements."""

    domain: Domain

    @cached_property
    def chains(self) -> dict[str, Chain]:
        """By name, each before those that jump to it."""
        domain = self.domain
        chains = [
            *(_anchor(domain, peer) for peer in domain.peers),
            *flatten.from_iterable(
                (_from_client(domain, network), _from_tunnel(network))
                for network in domain.networks
            ),
            _prerouting(domain),
            _mss_clamp(domain),
            _forward(domain),
            _source_nat(domain),
            _leak_guard(domain),
            _tunnel_out(domain),
        ]
        return {chain.name: chain for chain in chains}

    @cached_property
    def sets(self) -> dict[str, SetDefinition]:
        """Sets and maps by name."""
        definitions = (
            definition
            for network in self.domain.networks
            for definition in _definitions(Names.of(network.name))
        )
        return {definition.name: definition for definition in definitions}

    @cached_property
    def anchors(self) -> dict[str, dict[bytes, str]]:
        """The elements of each network's anchor map: the anchor's value -> its chain."""
        elements = {anchor_value(peer.number): anchor_chain(peer.id) for peer in self.domain.peers}
        return {Names.of(network.name).anchors: elements for network in self.domain.networks}

    @property
    def counters(self) -> tuple[str, ...]:
        """Named counters: they live on when rules are replaced."""
        return (LEAKED, RESET)


def anchor_chain(ap: ApId) -> str:
    """The chain that sends a packet to the anchor `ap`."""
    return ANCHOR_CHAIN + ap


def anchor_value(number: int) -> bytes:
    """An anchor's value in the maps: an skb priority, in host order."""
    return _U32.pack(ANCHOR_TAG | number)


def anchor_number(value: bytes) -> int | None:
    """The number in an anchor's value; None: the value isn't one of ours."""
    number: int = _U32.unpack(value)[0] ^ ANCHOR_TAG
    return number if number <= 0xFFFF else None


def _concatenation(*types: int) -> int:
    result = 0
    for type_ in types:
        result = result << _BITS_PER_TYPE | type_
    return result


_FLOW_TYPE = _concatenation(_IPV4_ADDR, _IPV4_ADDR, _INET_PROTO, _INET_SERVICE, _INET_SERVICE)
_ECHO_TYPE = _concatenation(_IPV4_ADDR, _IPV4_ADDR, _INTEGER)
_SOCKET_TYPE = _concatenation(_IPV4_ADDR, _INET_SERVICE)


def _definitions(names: Names) -> tuple[SetDefinition, ...]:
    anchor_map = byte_orders(ByteOrder.MIXED, ByteOrder.HOST)
    return (
        SetDefinition(names.flows, _FLOW_TYPE, FLOW_SIZE, _CLASSID, 4, anchor_map),
        SetDefinition(names.echoes, _ECHO_TYPE, ECHO_SIZE, _CLASSID, 4, echo_map()),
        SetDefinition(names.sockets, _SOCKET_TYPE, SOCKET_SIZE, _CLASSID, 4, anchor_map),
        SetDefinition(
            names.elsewhere, _IPV4_ADDR, ADDRESS_SIZE, userdata=byte_orders(ByteOrder.NETWORK)
        ),
        SetDefinition(
            names.anchors,
            _CLASSID,
            4,
            VERDICT,
            _VERDICT_LENGTH,
            byte_orders(ByteOrder.HOST, ByteOrder.MIXED),
        ),
    )


def _anchor(domain: Domain, peer: Ap) -> Chain:
    return Chain(
        anchor_chain(peer.id),
        (e.set_mark(domain.mark(peer), domain.mark_mask), e.notrack(), e.accept()),
    )


def _from_client(domain: Domain, network: Network) -> Chain:
    names = Names.of(network.name)
    trigger = (
        *e.limit_per_second(_DATA_TRIGGER_RATE, _DATA_TRIGGER_BURST),
        *e.log(domain.nflog_group, _DATA_TRIGGER_SNAPLEN),
    )
    return Chain(
        names.from_client,
        (
            (*_from(network.prefix, negate=True), *e.return_()),
            (*e.ipv4(), *e.client_address(), *e.in_set(names.elsewhere), *trigger),
            (*e.ipv4(), *e.l4proto(UDP), *e.client_socket(), *e.priority_from(names.sockets)),
            (*e.ipv4(), *e.client_flow(), *e.priority_from(names.flows)),
            (
                *e.ipv4(),
                *e.l4proto(ICMP),
                *e.icmp_echo_request(),
                *e.client_echo(),
                *e.priority_from(names.echoes),
            ),
            e.priority_verdict(names.anchors),
        ),
    )


def _from_tunnel(network: Network) -> Chain:
    rule = (*_to(network.prefix), *e.notrack())
    return Chain(Names.of(network.name).from_tunnel, (rule,))


def _prerouting(domain: Domain) -> Chain:
    rules: list[Expressions] = []
    for network in domain.networks:
        names = Names.of(network.name)
        rules += [
            (*e.iifname(network.client_interface), *e.jump(names.from_client)),
            (*e.iifname(domain.device(network)), *e.jump(names.from_tunnel)),
        ]
    return Chain("prerouting", tuple(rules), Hook("filter", _PREROUTING, _RAW))


def _mss_clamp(domain: Domain) -> Chain:
    clamp = e.set_mss(domain.mss)
    rules: list[Expressions] = []
    for network in domain.networks:
        rules += [
            (*_from(network.prefix), *clamp),
            (*_to(network.prefix), *clamp),
        ]
    return Chain("mss_clamp", tuple(rules))


def _forward(domain: Domain) -> Chain:
    """Clamp from birth and in both directions; reset mid-connection TCP that matches no flow."""
    tcp = e.l4proto(TCP)
    syn = (*tcp, *e.tcp_flags(e.SYN | e.RST, e.SYN))
    not_syn = (*tcp, *e.tcp_flags(e.FIN | e.SYN | e.RST | e.ACK, e.SYN, negate=True))
    reset = tuple(
        (
            *_leaving(network),
            *e.ct_state_new(),
            *not_syn,
            *e.counter(RESET),
            *e.reject_with_reset(),
        )
        for network in domain.networks
    )
    return Chain(
        "forward", ((*syn, *e.jump("mss_clamp")), *reset), Hook("filter", _FORWARD, _MANGLE)
    )


def _source_nat(domain: Domain) -> Chain:
    rules = tuple(
        (
            *_leaving(network),
            *(e.snat(network.nat_address) if network.nat_address else e.masquerade()),
        )
        for network in domain.networks
    )
    return Chain("srcnat", rules, Hook("nat", _POSTROUTING, _SOURCE_NAT))


def _leak_guard(domain: Domain) -> Chain:
    rules = tuple((*_leaving(n), *e.counter(LEAKED), *e.drop()) for n in domain.networks)
    return Chain("leak_guard", rules, Hook("filter", _POSTROUTING, _LAST))


def _tunnel_out(domain: Domain) -> Chain:
    """Take the mark off what enters a tunnel, now that it is routed.

    The outer packet inherits it, and a policy router that marks clients' packets (mwan3, pbr)
    would send the outer one along with them instead of to the peer.
    """
    rules = tuple((*e.oifname(domain.device(n)), *e.clear_mark()) for n in domain.networks)
    return Chain("tunnel_out", rules, Hook("filter", _POSTROUTING, _LAST))


def _from(prefix: IPv4Network, *, negate: bool = False) -> Expressions:
    return e.in_prefix(e.SOURCE_ADDRESS, prefix, negate=negate)


def _to(prefix: IPv4Network) -> Expressions:
    return e.in_prefix(e.DESTINATION_ADDRESS, prefix)


def _leaving(network: Network) -> Expressions:
    """On its way out of the uplink with a client's address as source."""
    return (*e.oifname(network.uplink), *_from(network.prefix))
