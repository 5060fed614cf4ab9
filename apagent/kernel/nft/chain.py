"""Chains as data, and the matches that most rules begin with."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from ipaddress import IPv4Network
from typing import NamedTuple

from apagent.core.domain import Network
from apagent.kernel.nft import expressions as e
from apagent.kernel.nft.expressions import Expressions
from apagent.kernel.nft.messages import Hook, new_rule
from apagent.kernel.wire import Message

RAW, MANGLE, DESTINATION_NAT, AFTER_DESTINATION_NAT = -300, -150, -110, -90
SOURCE_NAT, LAST = 90, 300
"""Hook priorities (linux/netfilter_ipv4.h). Source NAT comes before a firewall's own at 100, so
that ours decides; the leak guard comes after every NAT."""
PREROUTING, FORWARD, OUTPUT, POSTROUTING = 0, 2, 3, 4
"""NF_INET_PRE_ROUTING, FORWARD, _LOCAL_OUT, _POST_ROUTING (linux/netfilter.h)."""

_OURS = "apagent "


def number_in(fingerprint: str) -> int | None:
    """The `number` of the chain that carries this fingerprint; None: it has none."""
    number = fingerprint.removeprefix(_OURS).partition(" ")[2]
    return int(number) if number.isdecimal() else None


class PackedRules(NamedTuple):
    """A chain's rules for the kernel."""

    fingerprint: str
    """What tells these rules from others: a restart leaves a chain alone that carries it."""
    messages: tuple[Message, ...]
    """Requests that append the rules; the first carries the fingerprint as its comment."""


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain and all its rules; with a hook it is a base chain."""

    name: str
    rules: tuple[Expressions, ...]
    hook: Hook | None = None
    number: int | None = None
    """Kept with the rules, for who reads them back: the number of the anchor that they lead to."""

    def packed(self, table: str) -> PackedRules:
        """The rules as requests. To pack them takes milliseconds: keep the result."""
        rules = [new_rule(table, self.name, rule) for rule in self.rules]
        digest = sha256(b"".join(message.body for message in rules)).hexdigest()
        number = "" if self.number is None else f" {self.number}"
        fingerprint = f"{_OURS}{digest[:16]}{number}"
        first = [new_rule(table, self.name, rule, fingerprint) for rule in self.rules[:1]]
        return PackedRules(fingerprint, (*first, *rules[1:]))


def source_in(prefix: IPv4Network, *, negate: bool = False) -> Expressions:
    """`ip saddr [!=] prefix`."""
    return e.in_prefix(e.SOURCE_ADDRESS, prefix, negate=negate)


def destination_in(prefix: IPv4Network, *, negate: bool = False) -> Expressions:
    """`ip daddr [!=] prefix`."""
    return e.in_prefix(e.DESTINATION_ADDRESS, prefix, negate=negate)


def leaving(network: Network) -> Expressions:
    """On its way out of the uplink with a client's address as source."""
    return (*e.oifname(network.uplink), *source_in(network.prefix))
