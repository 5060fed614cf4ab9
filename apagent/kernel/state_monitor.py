"""Notices what others change of our kernel state: rtnetlink and nf_tables events.

Every event carries the port id of the socket that asked for the change, or 0 where the kernel acted
by itself. Sysctls of interfaces that the kernel announces are rp_filter, proxy_arp and forwarding.
Filters in the kernel let through only what somebody else asked for, or what is ours by
its looks, so that neither our own changes nor the life of neighbour tables wake us up.

Events on nftables cost the one who makes the change some 0.9 µs an element, heard or not: the
kernel writes them as soon as anybody listens. So we listen only where others can change the table
at all, that is where it isn't owned (before Linux 6.9).

What no event tells (linux 6.18): the routes and neighbours that go with an interface that is set
down (the interface's own event does), and what a program changes by ioctl, such as `arp -d`.
"""

from __future__ import annotations

import select
import socket
import sys
from collections.abc import Callable, Iterable

from apagent.core.domain import Domain
from apagent.errors import EventsLost
from apagent.kernel import links, packet_filter, rules
from apagent.kernel.links import RTM_DELADDR, RTM_DELLINK, RTM_NEWADDR, RTM_NEWLINK
from apagent.kernel.nft.events import names_table
from apagent.kernel.packet_filter import DROP, KEEP
from apagent.kernel.port import Doubt
from apagent.kernel.rtnetlink import (
    AF_BRIDGE,
    NTF_SELF,
    RTM_DELNEIGH,
    RTM_DELROUTE,
    RTM_NEWNEIGH,
    RTM_NEWROUTE,
    parse_neighbour,
    parse_route,
)
from apagent.kernel.wire import HEADER, Netlink, attributes, split

_NETLINK_ROUTE, _NETLINK_NETFILTER = 0, 12
_ROUTE_GROUPS = (1, 3, 5, 7, 8, 24)
"""RTNLGRP_LINK, _NEIGH, _IPV4_IFADDR, _ROUTE, _RULE and _NETCONF (linux/rtnetlink.h)."""
_RTM_NEWNETCONF = 80
_NETCONF_SIZE, _NETCONF_IFINDEX = 4, 1
_EVERY_INTERFACE = -1
"""struct netconfmsg, NETCONFA_IFINDEX, NETCONFA_IFINDEX_ALL (linux/netconf.h)."""
_TABLE_GROUPS = (7,)
"""NFNLGRP_NFTABLES (linux/netfilter/nfnetlink.h)."""
_BUFFER = 1 << 20
_MESSAGE_SIZE = 1 << 16

_TYPE_AT, _PORT_AT, _BODY_AT = 4, 12, HEADER.size
_FAMILY_AT = _BODY_AT
_NEIGHBOUR_FLAGS_AT = _BODY_AT + 10
_ROUTE_TABLE_AT, _ROUTE_PROTOCOL_AT = _BODY_AT + 4, _BODY_AT + 5
"""Fields of struct nlmsghdr, ndmsg and rtmsg."""
_RT_TABLE_COMPAT = 252
"""What a route says whose table has a number that doesn't fit its one byte, as ours don't."""
_KERNEL = 0


class LinuxStateMonitor:
    """A `StateMonitor` (apagent.kernel.port) on the current network namespace.

    `route_port` and `table_port` are the port ids of the sockets by which we make our own changes;
    without a `table_port` the table is not watched.
    """

    def __init__(self, domain: Domain, route_port: int, table_port: int | None) -> None:
        self._table = domain.table
        self._judge = _Judge(domain)
        self._buffer = bytearray(_MESSAGE_SIZE)
        self._epoll = select.epoll()
        self._sockets: dict[Netlink, Callable[[int, bytes], Doubt]] = {}
        program = _route_filter(route_port, domain.route_protocol)
        self._add(Netlink(_NETLINK_ROUTE, _ROUTE_GROUPS, _BUFFER, program), self._judge.doubt)
        if table_port is not None:
            program = _table_filter(table_port)
            events = Netlink(_NETLINK_NETFILTER, _TABLE_GROUPS, _BUFFER, program)
            self._add(events, self._doubt_table)

    def fileno(self) -> int:
        """Readable when events are waiting."""
        return self._epoll.fileno()

    def read(self) -> Doubt:
        """What the waiting events give reason to doubt; never blocks.

        Raises EventsLost after an overflow: then everything is in doubt.
        """
        doubts, lost = Doubt(0), None
        for events, judge in self._sockets.items():
            try:
                while size := events.events(self._buffer):
                    for type_, _, _, body in split(bytes(memoryview(self._buffer)[:size])):
                        doubts |= judge(type_, body)
            except EventsLost as error:
                lost = error
        if lost is not None:
            self._judge.find_interfaces()
            raise lost
        return doubts

    def close(self) -> None:
        """Close the sockets."""
        self._epoll.close()
        for events in self._sockets:
            events.close()

    def _add(self, events: Netlink, judge: Callable[[int, bytes], Doubt]) -> None:
        self._sockets[events] = judge
        self._epoll.register(events.fileno(), select.EPOLLIN)

    def _doubt_table(self, _type: int, body: bytes) -> Doubt:
        return Doubt.TABLE if names_table(body, self._table) else Doubt(0)


class _Judge:
    """Tells whether a change that rtnetlink announces touches us."""

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self._names = {
            name
            for network in domain.networks
            for name in (network.client_interface, network.uplink, domain.device(network))
        }
        self._indexes: set[int] = set()
        self.find_interfaces()

    def find_interfaces(self) -> None:
        """Look the indexes of the interfaces that concern us up again."""
        self._indexes = {index for index, name in socket.if_nameindex() if name in self._names}

    def doubt(self, type_: int, body: bytes) -> Doubt:
        """What one message gives reason to doubt."""
        if type_ in (RTM_NEWLINK, RTM_DELLINK):
            return self._doubt_link(body)
        return Doubt.ROUTING if self._is_ours(type_, body) else Doubt(0)

    def _doubt_link(self, body: bytes) -> Doubt:
        link = links.parse_link(body)
        if link.name not in self._names and link.ifindex not in self._indexes:
            return Doubt(0)
        self.find_interfaces()
        return Doubt.INTERFACES | Doubt.ROUTING

    def _is_ours(self, type_: int, body: bytes) -> bool:
        domain = self._domain
        if type_ in (RTM_NEWNEIGH, RTM_DELNEIGH):
            return parse_neighbour(body).ifindex in self._indexes
        if type_ in (RTM_NEWADDR, RTM_DELADDR):
            return links.parse_address(body).ifindex in self._indexes
        if type_ in (RTM_NEWROUTE, RTM_DELROUTE):
            route = parse_route(body)
            return route.protocol == domain.route_protocol or route.table in domain.route_tables
        if type_ in (rules.RTM_NEWRULE, rules.RTM_DELRULE):
            rule = rules.parse_rule(body)
            return rule.protocol == domain.route_protocol
        if type_ == _RTM_NEWNETCONF:
            return _configured(body) in {_EVERY_INTERFACE, *self._indexes}
        return False


def _configured(body: bytes) -> int:
    """Index of the interface whose sysctls a message says to be changed; 0: it doesn't say."""
    index = dict(attributes(body, _NETCONF_SIZE)).get(_NETCONF_IFINDEX, b"")
    return int.from_bytes(index, sys.byteorder, signed=True)


def _types(numbers: Iterable[int], label: str) -> list[packet_filter.Step]:
    return [packet_filter.equals(socket.htons(number), label) for number in numbers]


def _route_filter(own_port: int, route_protocol: int) -> bytes:
    """Drops our own changes, what neighbour tables do by themselves, and others' routes.

    A VXLAN device doesn't say who changed its entries, but flags them as its own.
    """
    is_port, load_port = packet_filter.equals, packet_filter.load_word(_PORT_AT)
    equals, load_byte = packet_filter.equals, packet_filter.load_byte
    return packet_filter.assemble(
        ("start", [load_port, is_port(socket.htonl(own_port), DROP)]),
        (
            "type",
            [
                packet_filter.load_half(_TYPE_AT),
                *_types((RTM_NEWNEIGH, RTM_DELNEIGH), "neighbour"),
                *_types((RTM_NEWROUTE, RTM_DELROUTE), "route"),
                *_types((RTM_NEWLINK, RTM_DELLINK), "link"),
                packet_filter.go(KEEP),
            ],
        ),
        (
            "neighbour",
            [load_byte(_FAMILY_AT), equals(AF_BRIDGE, "entry")],
        ),
        ("neighbour by", [load_port, is_port(_KERNEL, DROP, KEEP)]),
        (
            "entry",
            [load_byte(_NEIGHBOUR_FLAGS_AT), packet_filter.has_bit(NTF_SELF, KEEP, DROP)],
        ),
        (
            "route",
            [
                load_byte(_ROUTE_PROTOCOL_AT),
                equals(route_protocol, KEEP),
                load_byte(_ROUTE_TABLE_AT),
                equals(_RT_TABLE_COMPAT, KEEP, DROP),
            ],
        ),
        # A bridge's ports report their states in this family, all the time.
        ("link", [load_byte(_FAMILY_AT), equals(AF_BRIDGE, DROP, KEEP)]),
    )


def _table_filter(own_port: int) -> bytes:
    """Drops our own changes, and elements that expire by themselves."""
    return packet_filter.assemble(
        (
            "start",
            [
                packet_filter.load_word(_PORT_AT),
                packet_filter.equals(socket.htonl(own_port), DROP),
                packet_filter.equals(_KERNEL, DROP, KEEP),
            ],
        )
    )
