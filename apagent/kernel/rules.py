"""Policy rules: which packets look into our routing tables before any other.

A rule for an anchor is bound to the client interface, because the outer VXLAN packet inherits the
inner one's mark: without `iif` it would be sent into the tunnel again. The rule for what we send
ourselves, which the outer packet is too, relies on the mark being taken off on the tunnel device.
"""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv4Network
from typing import NamedTuple

from pyroute2.netlink.rtnl.fibmsg import fibmsg

from apagent.core.domain import Domain, Network
from apagent.kernel.rtnetlink import AF_INET
from apagent.kernel.wire import (
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    Message,
    Netlink,
    attributes,
    encode,
)

RTM_NEWRULE, RTM_DELRULE, RTM_GETRULE = 32, 33, 34

# linux/fib_rules.h
_FIB_RULE_HDR = struct.Struct("=BBBBBBBBI")
_FRA_DST, _FRA_SRC, _FRA_IIFNAME, _FRA_GOTO, _FRA_PRIORITY, _FRA_FWMARK = 1, 2, 3, 4, 6, 10
_FRA_TABLE, _FRA_FWMASK, _FRA_PROTOCOL = 15, 16, 21
_FR_ACT_TO_TBL, _FR_ACT_GOTO = 1, 2
_OUR_PRIORITIES = 3
_MAIN = 254
"""RT_TABLE_MAIN (linux/rtnetlink.h)."""
_U32 = struct.Struct("=I")
_OURSELVES = "lo"
"""Where the kernel says that packets come from that it makes itself."""


class Rule(NamedTuple):
    """A rule that leads to a routing table, or to later rules."""

    priority: int
    table: int
    protocol: int
    iif: str = ""
    mark: int = 0
    mask: int = 0
    destination: IPv4Network | None = None
    source: IPv4Network | None = None
    goto: int = 0
    """The priority of the rules that are next; 0: it leads to `table`."""

    def __str__(self) -> str:
        parts = [f"{self.priority}:"]
        if self.source is not None:
            parts.append(f"from {self.source}")
        if self.destination is not None:
            parts.append(f"to {self.destination}")
        if self.iif:
            parts.append(f"iif {self.iif}")
        if self.mask:
            parts.append(f"fwmark {self.mark:#x}/{self.mask:#x}")
        return " ".join([*parts, f"goto {self.goto}" if self.goto else f"lookup {self.table}"])


def wanted_rules(domain: Domain) -> set[Rule]:
    """The rules that the roam domain asks for, by priority.

    1. What has no mark of ours, nearly everything, passes over the next ones: two or three a peer,
       which the kernel would ask for each packet, and again for the way back to its sender.
    2. What has a mark goes to an anchor, or where its client was seen.
    3. Clients elsewhere, and peers' probes.
    """
    first, protocol = domain.rule_priority + 1, domain.route_protocol
    anchors = {
        Rule(
            first,
            domain.anchor_table(network, peer),
            protocol,
            network.client_interface,
            domain.mark(peer),
            domain.mark_mask,
        )
        for network in domain.networks
        for peer in domain.peers
    }
    # Errors of our own have a mark only if they belong to an anchor; any tunnel leads to it.
    table = domain.anchor_table
    errors = {
        Rule(
            first,
            table(domain.networks[0], peer),
            protocol,
            _OURSELVES,
            domain.mark(peer),
            domain.mark_mask,
        )
        for peer in domain.peers
    }
    hosts = {rule for network in domain.networks for rule in _host_rules(domain, network)}
    others = {_unmarked_rule(domain), _answers_rule(domain)}
    return _learned_rules(domain) | anchors | errors | hosts | others


def _unmarked_rule(domain: Domain) -> Rule:
    first, mask = domain.rule_priority, domain.mark_mask
    return Rule(first, 0, domain.route_protocol, mask=mask, goto=_hosts_priority(domain))


def _hosts_priority(domain: Domain) -> int:
    return domain.rule_priority + _OUR_PRIORITIES - 1


def _answers_rule(domain: Domain) -> Rule:
    """What we answer to a peer's tunnel address, such as its probes, goes back through a tunnel."""
    return Rule(
        _hosts_priority(domain),
        domain.host_table(domain.networks[0]),
        domain.route_protocol,
        source=IPv4Network(domain.me.tunnel_address),
    )


def _learned_rules(domain: Domain) -> set[Rule]:
    """Where a client is that the kernel has seen to roam: here, or at a peer.

    Bound to the clients' addresses, which no packet has that is in a tunnel already.
    """
    first, protocol, mask = domain.rule_priority + 1, domain.route_protocol, domain.mark_mask
    here = Rule(first, _MAIN, protocol, mark=domain.here_mark, mask=mask)
    return {here} | {
        Rule(
            first,
            domain.anchor_table(network, peer),
            protocol,
            mark=domain.mark(peer),
            mask=mask,
            destination=network.prefix,
        )
        for network in domain.networks
        for peer in domain.peers
        if not network.zone
    }


def _host_rules(domain: Domain, network: Network) -> list[Rule]:
    """Which packets look for a client of `network`.

    A network with a zone shares its addresses with another one: what tells its packets is where
    they come from or, from the uplink and from ourselves, the mark of their conntrack zone.
    """
    to_prefix = Rule(
        _hosts_priority(domain),
        domain.host_table(network),
        domain.route_protocol,
        destination=network.prefix,
    )
    if not network.zone:
        return [to_prefix]
    return [
        to_prefix._replace(iif=network.client_interface),
        to_prefix._replace(iif=domain.device(network)),
        to_prefix._replace(mark=domain.zone_mark(network), mask=domain.mark_mask),
    ]


def prepare_rules(netlink: Netlink, domain: Domain) -> None:
    """Install the missing rules, then remove ours that nobody wants. Raises KernelFault."""
    wanted, present = wanted_rules(domain), _own_rules(netlink, domain)
    netlink.request(_add(rule) for rule in sorted(wanted - set(present), key=str))
    netlink.request(_delete(rule) for rule in present if rule not in wanted)


def remove_rules(netlink: Netlink, domain: Domain) -> list[str]:
    """Remove every rule of ours; a line each. Raises KernelFault."""
    present = _own_rules(netlink, domain)
    netlink.request(_delete(rule) for rule in present)
    return [f"policy rule {rule}" for rule in present]


def _own_rules(netlink: Netlink, domain: Domain) -> list[Rule]:
    """Rules with our protocol at our priorities or to our tables."""
    body = _FIB_RULE_HDR.pack(AF_INET, 0, 0, 0, 0, 0, 0, 0, 0)
    answer = netlink.table(Message(RTM_GETRULE, NLM_F_DUMP, body, "reading the policy rules"))
    priorities = range(domain.rule_priority, domain.rule_priority + _OUR_PRIORITIES)
    return [
        rule
        for rule in map(parse_rule, answer)
        if rule.protocol == domain.route_protocol
        and (rule.priority in priorities or rule.table in domain.route_tables)
    ]


def parse_rule(body: bytes) -> Rule:
    """Read an RTM_NEWRULE message."""
    _, length, source_length, _, table, _, _, _, _ = _FIB_RULE_HDR.unpack_from(body)
    found = dict(attributes(body, _FIB_RULE_HDR.size))

    def number(type_: int, default: int = 0) -> int:
        return int(_U32.unpack(found[type_])[0]) if type_ in found else default

    def prefix(type_: int, length: int) -> IPv4Network | None:
        return IPv4Network((IPv4Address(found[type_]), length)) if type_ in found else None

    return Rule(
        number(_FRA_PRIORITY),
        number(_FRA_TABLE, table),
        found.get(_FRA_PROTOCOL, b"\0")[0],
        found.get(_FRA_IIFNAME, b"").rstrip(b"\0").decode(errors="replace"),
        number(_FRA_FWMARK),
        number(_FRA_FWMASK),
        prefix(_FRA_DST, length),
        prefix(_FRA_SRC, source_length),
        number(_FRA_GOTO),
    )


def _add(rule: Rule) -> Message:
    return Message(RTM_NEWRULE, NLM_F_CREATE | NLM_F_EXCL, _encode(rule), f"policy rule {rule}")


def _delete(rule: Rule) -> Message:
    return Message(RTM_DELRULE, 0, _encode(rule), f"removing policy rule {rule}")


def _encode(rule: Rule) -> bytes:
    message = fibmsg()
    message["family"] = AF_INET
    message["action"] = _FR_ACT_GOTO if rule.goto else _FR_ACT_TO_TBL
    attrs: list[tuple[str, object]] = [
        ("FRA_PRIORITY", rule.priority),
        ("FRA_GOTO", rule.goto) if rule.goto else ("FRA_TABLE", rule.table),
        ("FRA_PROTOCOL", rule.protocol),
    ]
    if rule.destination is not None:
        message["dst_len"] = rule.destination.prefixlen
        attrs.append(("FRA_DST", str(rule.destination.network_address)))
    if rule.source is not None:
        message["src_len"] = rule.source.prefixlen
        attrs.append(("FRA_SRC", str(rule.source.network_address)))
    if rule.iif:
        attrs.append(("FRA_IIFNAME", rule.iif))
    if rule.mask:
        attrs += [("FRA_FWMARK", rule.mark), ("FRA_FWMASK", rule.mask)]
    message["attrs"] = attrs
    return encode(message)
