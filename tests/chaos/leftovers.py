"""What is left where nothing should be: in each AP's kernel after a clean-up, and after the lab."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from ipaddress import IPv4Address

from apagent.lab import namespaces, processes
from apagent.lab.lab import Lab
from apagent.lab.place import Place
from apagent.lab.plan import CLIENT_ADDRESSES
from apagent.lab.programs import path
from tests.chaos.agreement import uplink_addresses

_OURS = 176
"""`kernel.route_protocol`."""
_RULES = {0, 32766, 32767}
"""Priorities of the rules that every kernel has."""


def clean_up(lab: Lab) -> list[str]:
    """Stop every agent and let it clean up; what is left of it, a line each."""
    left: list[str] = []
    for ap in lab.aps:
        if lab.agents.process(ap) is None:
            left.append(f"{ap}: its agent has ended by itself")
        else:
            lab.kill_agent(ap, signal.SIGTERM)
    for ap in lab.aps:
        config = str(lab.agents.config_file(ap))
        lab.run(ap, [path("apagent"), "cleanup", "--config", config])
        left += [f"{ap}: {what}" for what in _left(lab, ap)]
    return left


def _left(lab: Lab, ap: str) -> Iterator[str]:
    yield from lab.run(ap, ["nft", "list", "tables"]).stdout.splitlines()
    for rule in json.loads(lab.run(ap, ["ip", "-j", "rule"]).stdout):
        if rule["priority"] not in _RULES:
            yield f"rule {rule}"
    routes = lab.run(ap, ["ip", "-4", "route", "show", "table", "all", "proto", str(_OURS)])
    yield from (f"route {line}" for line in routes.stdout.splitlines())
    planned = {interface.name: interface for interface in lab.plan.on(ap)}
    for link in json.loads(lab.run(ap, ["ip", "-j", "link"]).stdout):
        if link["ifname"] != "lo" and link["ifname"] not in planned:
            yield f"device {link['ifname']}"
    own = {str(address.ip) for i in planned.values() for address in i.addresses}
    yield from (f"address {a}" for a in uplink_addresses(lab, ap) if a not in own)
    entries = lab.run(ap, ["ip", "neigh", "show", "nud", "permanent"])
    yield from (f"neighbour {line}" for line in entries.stdout.splitlines())
    yield from _conntrack(lab, ap, own)


def _conntrack(lab: Lab, ap: str, own: set[str]) -> Iterator[str]:
    """Entries that translate to an address that isn't the AP's own."""
    listed = lab.run(ap, ["conntrack", "-L", "--src-nat"], check=False).stdout
    for line in listed.splitlines():
        words = [word.partition("=") for word in line.split()]
        source = next(value for key, _, value in words if key == "src")
        target = [value for key, _, value in words if key == "dst"][-1]
        if IPv4Address(source) in CLIENT_ADDRESSES and target not in own:
            yield f"conntrack entry {' '.join(line.split())}"


def after(place: Place, inside: set[tuple[int, int]]) -> list[str]:
    """What is left of a lab that was taken down; `inside` are the namespaces that it had."""
    left = [f"namespace {name}" for name in namespaces.names() if place.owns(name)]
    left += [f"process {process.pid}" for process in processes.in_namespaces(inside)]
    if place.root.exists():
        left.append(f"directory {place.root}: {sorted(p.name for p in place.root.iterdir())}")
    return left


def identities(lab: Lab) -> set[tuple[int, int]]:
    """The namespaces of a lab, as processes name them."""
    return {namespaces.identity(lab.namespace(node)) for node in lab.nodes}
