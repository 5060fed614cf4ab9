"""Makes what a plan says: namespaces, bridges, cables, addresses, routes, sysctls."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from socket import NETLINK_ROUTE

from apagent.kernel.wire import Message, Netlink
from apagent.lab import namespaces, rtnl
from apagent.lab.place import Place
from apagent.lab.plan import Node, Plan

_SYSCTLS = {
    # IPv6 would only add noise: router solicitations, neighbour discovery, multicast reports.
    "ipv6/conf/all/disable_ipv6": 1,
    "ipv6/conf/default/disable_ipv6": 1,
    # New namespaces inherit these from the machine (net.core.devconf_inherit_init_net); a lab
    # behaves the same on every machine.
    "ipv4/conf/all/rp_filter": 0,
    "ipv4/conf/default/rp_filter": 0,
}


def make(place: Place, plan: Plan) -> None:
    """Build the whole topology. Raises LabError and KernelFault; what is made by then stays."""
    for node in plan.nodes:
        _make_namespace(place, node)
    with contextlib.ExitStack() as stack:
        sockets = {
            node.name: stack.enter_context(route_socket(place, node.name)) for node in plan.nodes
        }
        _make_links(place, plan, sockets)
        for node in plan.nodes:
            sockets[node.name].request(_configuration(plan, node))


@contextlib.contextmanager
def route_socket(place: Place, node: str) -> Iterator[Netlink]:
    """An rtnetlink socket in a node's namespace."""
    with namespaces.inside(place.namespace(node)):
        netlink = Netlink(NETLINK_ROUTE)
    try:
        yield netlink
    finally:
        netlink.close()


def _make_namespace(place: Place, node: Node) -> None:
    name = place.namespace(node.name)
    namespaces.create(name)
    with namespaces.inside(name):
        for sysctl, value in _SYSCTLS.items():
            namespaces.set_sysctl(sysctl, value)
        namespaces.set_sysctl("ipv4/ip_forward", int(node.forwards))


def _make_links(place: Place, plan: Plan, sockets: dict[str, Netlink]) -> None:
    for bridge in plan.bridges:
        sockets[bridge.node].request([rtnl.bridge(bridge)])
    for veth in plan.veths:
        there = os.open(namespaces.path(place.namespace(veth.far.node)), os.O_RDONLY)
        try:
            sockets[veth.near.node].request([rtnl.veth(veth, there)])
        finally:
            os.close(there)


def _configuration(plan: Plan, node: Node) -> Iterator[Message]:
    yield rtnl.loopback_up()
    for interface in plan.on(node.name):
        yield from rtnl.configure(interface)
    if node.gateway is not None:
        yield rtnl.default_route(node.gateway, node.name)
