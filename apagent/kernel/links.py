"""Interfaces and their addresses: reading all of them, making and changing VXLAN devices."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address
from typing import NamedTuple

from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from apagent.core.model import Mac
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

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
IFF_UP = 1

# linux/if_link.h and linux/if_addr.h
_IFINFOMSG = struct.Struct("=BxHiII")
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINKINFO = 1, 3, 4, 18
_IFLA_INFO_KIND, _IFLA_INFO_DATA = 1, 2
_VXLAN_ID, _VXLAN_LOCAL, _VXLAN_LEARNING, _VXLAN_PORT = 1, 4, 7, 15
_IFADDRMSG = struct.Struct("=BBBBI")
_IFA_ADDRESS, _IFA_LOCAL, _IFA_RT_PRIORITY = 1, 2, 9
_U32 = struct.Struct("=I")


class Vxlan(NamedTuple):
    """What of a VXLAN device can't be changed while it exists."""

    vni: int
    local: IPv4Address
    port: int
    learning: bool = False


class Link(NamedTuple):
    """An interface."""

    ifindex: int
    name: str
    mac: Mac
    mtu: int
    up: bool
    kind: str = ""
    """As `ip -d link` names it: "bridge", "vxlan"; empty for hardware."""
    vxlan: Vxlan | None = None
    """None also for a VXLAN device without a local address over IPv4, which can't be ours."""


class Address(NamedTuple):
    """An IPv4 address on an interface."""

    ifindex: int
    local: IPv4Address
    length: int
    metric: int = 0
    """Of the routes that the kernel makes for it."""


def links(netlink: Netlink) -> dict[str, Link]:
    """All interfaces of the namespace by name."""
    body = _IFINFOMSG.pack(0, 0, 0, 0, 0)
    answer = netlink.table(Message(RTM_GETLINK, NLM_F_DUMP, body, "reading the interfaces"))
    return {link.name: link for link in map(parse_link, answer)}


def parse_link(body: bytes) -> Link:
    """Read an RTM_NEWLINK message."""
    _, _, index, flags, _ = _IFINFOMSG.unpack_from(body)
    found = dict(attributes(body, _IFINFOMSG.size))
    info = dict(attributes(found.get(_IFLA_LINKINFO, b"")))
    kind = _text(info.get(_IFLA_INFO_KIND, b""))
    return Link(
        index,
        _text(found[_IFLA_IFNAME]),
        Mac(found.get(_IFLA_ADDRESS, b"").hex(":")),
        _U32.unpack(found.get(_IFLA_MTU, bytes(4)))[0],
        bool(flags & IFF_UP),
        kind,
        _parse_vxlan(info.get(_IFLA_INFO_DATA, b"")) if kind == "vxlan" else None,
    )


def _parse_vxlan(data: bytes) -> Vxlan | None:
    found = dict(attributes(data))
    if _VXLAN_LOCAL not in found:
        return None
    return Vxlan(
        _U32.unpack(found[_VXLAN_ID])[0],
        IPv4Address(found[_VXLAN_LOCAL]),
        int.from_bytes(found[_VXLAN_PORT], "big"),
        found[_VXLAN_LEARNING] != b"\0",
    )


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")


def make_vxlan(name: str, mac: Mac, mtu: int, vxlan: Vxlan) -> Message:
    """Make a VXLAN device and set it up."""
    data = [
        ("IFLA_VXLAN_ID", vxlan.vni),
        ("IFLA_VXLAN_LOCAL", str(vxlan.local)),
        ("IFLA_VXLAN_PORT", vxlan.port),
        ("IFLA_VXLAN_LEARNING", int(vxlan.learning)),
    ]
    info = [("IFLA_INFO_KIND", "vxlan"), ("IFLA_INFO_DATA", {"attrs": data})]
    message = _up(0, [("IFLA_IFNAME", name), *_changeable(mac, mtu)])
    message["attrs"].append(("IFLA_LINKINFO", {"attrs": info}))
    what = f"making VXLAN device {name} (VNI {vxlan.vni}, local address {vxlan.local})"
    return Message(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, encode(message), what)


def change_link(link: Link, mac: Mac, mtu: int) -> Message:
    """Give an interface another MAC and MTU, and set it up."""
    message = _up(link.ifindex, _changeable(mac, mtu))
    return Message(RTM_NEWLINK, 0, encode(message), f"setting MAC and MTU of {link.name}")


def _up(index: int, attrs: list[tuple[str, object]]) -> ifinfmsg:
    message = ifinfmsg()
    message["index"] = index
    message["flags"] = message["change"] = IFF_UP
    message["attrs"] = attrs
    return message


def _changeable(mac: Mac, mtu: int) -> list[tuple[str, object]]:
    return [("IFLA_ADDRESS", mac), ("IFLA_MTU", mtu)]


def delete_link(link: Link) -> Message:
    """Remove an interface, and with it its addresses, routes and neighbours."""
    message = ifinfmsg()
    message["index"] = link.ifindex
    return Message(RTM_DELLINK, 0, encode(message), f"removing interface {link.name}")


def addresses(netlink: Netlink) -> list[Address]:
    """All IPv4 addresses of the namespace."""
    body = _IFADDRMSG.pack(AF_INET, 0, 0, 0, 0)
    answer = netlink.table(Message(RTM_GETADDR, NLM_F_DUMP, body, "reading the addresses"))
    return [parse_address(entry) for entry in answer if entry[0] == AF_INET]


def parse_address(body: bytes) -> Address:
    """Read an RTM_NEWADDR message."""
    _, length, _, _, index = _IFADDRMSG.unpack_from(body)
    found = dict(attributes(body, _IFADDRMSG.size))
    local = found.get(_IFA_LOCAL, found.get(_IFA_ADDRESS, bytes(4)))
    (metric,) = _U32.unpack(found.get(_IFA_RT_PRIORITY, bytes(4)))
    return Address(index, IPv4Address(local), length, metric)


def add_address(address: Address, device: str) -> Message:
    """Give an interface an address."""
    what = f"adding {address.local}/{address.length} to {device}"
    return Message(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, _encode_address(address), what)


def delete_address(address: Address, device: str) -> Message:
    """Take an address from an interface."""
    what = f"removing {address.local}/{address.length} from {device}"
    return Message(RTM_DELADDR, 0, _encode_address(address), what)


def _encode_address(address: Address) -> bytes:
    message = ifaddrmsg()
    message["family"] = AF_INET
    message["prefixlen"] = address.length
    message["index"] = address.ifindex
    text = str(address.local)
    attrs: list[tuple[str, object]] = [("IFA_LOCAL", text), ("IFA_ADDRESS", text)]
    if address.metric:
        attrs.append(("IFA_RT_PRIORITY", address.metric))
    message["attrs"] = attrs
    return encode(message)
