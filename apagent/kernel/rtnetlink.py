"""Neighbours, FDB entries and IPv4 routes as rtnetlink has them, packed and parsed with `struct`.

They come by the thousand at a start and one by one on the way of every roam, so they don't go
through pyroute2's codecs. Layouts and numbers: linux/neighbour.h, linux/rtnetlink.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import NamedTuple

from apagent.core.model import Mac
from apagent.errors import KernelFault
from apagent.kernel.wire import (
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_REPLACE,
    Message,
    Netlink,
    attribute,
    attributes,
)

AF_INET = int(socket.AF_INET)
AF_BRIDGE = 7

RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
RTNLGRP_NEIGH = 3

NTF_SELF = 0x02
NTF_MASTER = 0x04
NUD_REACHABLE = 0x02
NUD_STALE = 0x04
NUD_FAILED = 0x20
NUD_NOARP = 0x40
NUD_PERMANENT = 0x80

_NDMSG = struct.Struct("=B3xiHBB")
_NDA_DST, _NDA_LLADDR, _NDA_VLAN, _NDA_IFINDEX, _NDA_MASTER, _NDA_PROTOCOL = 1, 2, 5, 8, 9, 12

_RTMSG = struct.Struct("=BBBBBBBBI")
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_TABLE = 1, 4, 5, 15
_RT_SCOPE_UNIVERSE, _RT_SCOPE_LINK = 0, 253
_RTN_UNICAST = 1
_RTNH_F_ONLINK = 4

_IFINFOMSG = struct.Struct("=BxHiII")
_IFLA_MASTER = 10
_U32 = struct.Struct("=I")


class Neighbour(NamedTuple):
    """A neighbour entry (family AF_INET) or a forwarding entry (AF_BRIDGE)."""

    family: int
    ifindex: int
    lladdr: bytes
    address: bytes = b""
    """The neighbour's IPv4 address, or the remote tunnel end of a VXLAN device's entry."""
    state: int = NUD_PERMANENT
    flags: int = 0
    protocol: int = 0
    """Who installed it (rtm_protocol numbers); kept by the kernel since Linux 5.0."""
    master: int = 0
    vlan: bytes = b""

    @property
    def mac(self) -> Mac:
        """The link-layer address; empty where the kernel doesn't know it."""
        return Mac(self.lladdr.hex(":"))

    def packed(self) -> bytes:
        """The body of a request that names this entry."""
        parts = [_NDMSG.pack(self.family, self.ifindex, self.state, self.flags, 0)]
        for type_, value in (
            (_NDA_DST, self.address),
            (_NDA_LLADDR, self.lladdr),
            (_NDA_VLAN, self.vlan),
        ):
            if value:
                parts.append(attribute(type_, value))
        if self.protocol:
            parts.append(attribute(_NDA_PROTOCOL, bytes([self.protocol])))
        return b"".join(parts)


def parse_neighbour(body: bytes) -> Neighbour:
    """Read an RTM_*NEIGH message."""
    family, ifindex, state, flags, _ = _NDMSG.unpack_from(body)
    found = dict(attributes(body, _NDMSG.size))
    return Neighbour(
        family,
        ifindex,
        found.get(_NDA_LLADDR, b""),
        found.get(_NDA_DST, b""),
        state,
        flags,
        found.get(_NDA_PROTOCOL, b"\0")[0],
        _U32.unpack(found[_NDA_MASTER])[0] if _NDA_MASTER in found else 0,
        found.get(_NDA_VLAN, b""),
    )


def mac_bytes(mac: Mac) -> bytes:
    """The six bytes of `mac`."""
    return bytes.fromhex(mac.replace(":", ""))


def neighbours(netlink: Netlink, ifindex: int) -> list[Neighbour]:
    """The IPv4 neighbour entries on an interface."""
    body = _NDMSG.pack(AF_INET, 0, 0, 0, 0) + attribute(_NDA_IFINDEX, _U32.pack(ifindex))
    return _neighbour_table(netlink, body, AF_INET, "reading the neighbour table", ifindex)


def bridge_entries(netlink: Netlink, bridge: int) -> list[Neighbour]:
    """What the bridge with interface index `bridge` learned or was told; empty: no bridge."""
    # The kernel takes struct ifinfomsg here, as before Linux 4.12, and filters by its master.
    body = _IFINFOMSG.pack(AF_BRIDGE, 0, 0, 0, 0) + attribute(_IFLA_MASTER, _U32.pack(bridge))
    message = Message(RTM_GETNEIGH, NLM_F_DUMP, body, "reading the bridge's forwarding table")
    found = (parse_neighbour(entry) for entry in netlink.table(message))
    return [entry for entry in found if entry.master == bridge]


def device_entries(netlink: Netlink, ifindex: int) -> list[Neighbour]:
    """The forwarding entries of a device of its own (VXLAN)."""
    body = _IFINFOMSG.pack(AF_BRIDGE, 0, ifindex, 0, 0)
    return _neighbour_table(
        netlink, body, AF_BRIDGE, "reading the tunnel's forwarding table", ifindex
    )


def _neighbour_table(
    netlink: Netlink, body: bytes, family: int, what: str, ifindex: int
) -> list[Neighbour]:
    message = Message(RTM_GETNEIGH, NLM_F_DUMP, body, what)
    found = (parse_neighbour(entry) for entry in netlink.table(message))
    return [entry for entry in found if entry.ifindex == ifindex and entry.family == family]


def set_neighbour(entry: Neighbour, what: str) -> Message:
    """Install `entry`, in place of another one of its address (or MAC, for AF_BRIDGE)."""
    return Message(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, entry.packed(), what)


def delete_neighbour(entry: Neighbour, what: str) -> Message:
    """Delete `entry`; the kernel answers ENOENT if it is gone."""
    return Message(RTM_DELNEIGH, 0, entry.packed(), what)


@dataclass(frozen=True, slots=True)
class Route:
    """A unicast IPv4 route via a gateway on an interface, reachable there without a route.

    Without a gateway (0.0.0.0) a prefix is on the interface's link; a request to delete may leave
    it open.
    """

    table: int
    destination: IPv4Address
    length: int
    gateway: IPv4Address
    oif: int
    protocol: int

    def __str__(self) -> str:
        return f"{self.destination}/{self.length} via {self.gateway} in table {self.table}"

    def packed(self) -> bytes:
        """The body of a request that names this route."""
        connected = self.length < 32 and not int(self.gateway)
        scope = _RT_SCOPE_LINK if connected else _RT_SCOPE_UNIVERSE
        type_, flags = _RTN_UNICAST, 0 if connected else _RTNH_F_ONLINK
        head = _RTMSG.pack(AF_INET, self.length, 0, 0, 0, self.protocol, scope, type_, flags)
        parts = [
            head,
            attribute(_RTA_TABLE, _U32.pack(self.table)),
            attribute(_RTA_DST, self.destination.packed),
            attribute(_RTA_OIF, _U32.pack(self.oif)),
        ]
        if int(self.gateway):
            parts.append(attribute(_RTA_GATEWAY, self.gateway.packed))
        return b"".join(parts)


def parse_route(body: bytes) -> Route:
    """Read an RTM_NEWROUTE message; what it doesn't say is 0."""
    _, length, _, _, _, protocol, _, _, _ = _RTMSG.unpack_from(body)
    found = dict(attributes(body, _RTMSG.size))
    return Route(
        _U32.unpack(found.get(_RTA_TABLE, bytes(4)))[0],
        IPv4Address(found.get(_RTA_DST, bytes(4))),
        length,
        IPv4Address(found.get(_RTA_GATEWAY, bytes(4))),
        _U32.unpack(found.get(_RTA_OIF, bytes(4)))[0],
        protocol,
    )


def routes(netlink: Netlink, protocol: int) -> list[Route]:
    """The IPv4 routes with this protocol number, in any table."""
    body = _RTMSG.pack(AF_INET, 0, 0, 0, 0, 0, 0, 0, 0)
    answer = netlink.table(Message(RTM_GETROUTE, NLM_F_DUMP, body, "reading the routes"))
    # The protocol is the sixth byte of struct rtmsg: the others' routes needn't be parsed.
    return [parse_route(entry) for entry in answer if entry[5] == protocol]


def set_route(route: Route, what: str) -> Message:
    """Install `route`, in place of another one to its destination in its table."""
    return Message(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, route.packed(), what)


def delete_route(route: Route, what: str) -> Message:
    """Delete `route`; the kernel answers ESRCH if it is gone."""
    return Message(RTM_DELROUTE, 0, route.packed(), what)


def interface_index(name: str, role: str) -> int:
    """The index of an interface; `role` says what it is to us. Raises KernelFault (ENODEV)."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        raise KernelFault(f"{role}: there is no interface {name}", errno.ENODEV) from None
