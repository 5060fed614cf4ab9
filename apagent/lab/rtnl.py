"""rtnetlink messages that build a lab: the only module here that uses pyroute2, to encode them."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Interface
from typing import Any

from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from apagent.kernel.wire import (
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    Message,
    attributes,
    encode,
)
from apagent.lab.plan import Interface, Veth

_RTM_NEWLINK = 16
_RTM_GETLINK = 18
_RTM_SETLINK = 19
_RTM_NEWADDR = 20
_RTM_NEWROUTE = 24
_IFF_UP = 1
_IFF_RUNNING = 0x40
_IFLA_MASTER = 10
_RT_TABLE_MAIN = 254
_RTPROT_STATIC = 4
_RTN_UNICAST = 1
_LOOPBACK_INDEX = 1

_NEW = NLM_F_CREATE | NLM_F_EXCL
_IFINFOMSG = struct.Struct("=BxHiII")
_U32 = struct.Struct("=I")

_Attributes = list[tuple[str, Any]]


def bridge(interface: Interface) -> Message:
    """Make a bridge that forwards at once: no spanning tree, no delay, no multicast snooping."""
    options: _Attributes = [
        ("IFLA_BR_STP_STATE", 0),
        ("IFLA_BR_FORWARD_DELAY", 0),
        ("IFLA_BR_MCAST_SNOOPING", 0),
    ]
    link = _link(interface)
    link["attrs"].append(_kind("bridge", options))
    return _message(_RTM_NEWLINK, _NEW, link, f"making the bridge {_on(interface)}")


def veth(pair: Veth, far_namespace: int) -> Message:
    """Make a pair, its far end in another namespace (an open file)."""
    far = _end(pair.far)
    far["attrs"].append(("IFLA_NET_NS_FD", far_namespace))
    near = _link(pair.near)
    near["attrs"].append(_kind("veth", [("VETH_INFO_PEER", far)]))
    return _message(_RTM_NEWLINK, _NEW, near, f"making the link {_on(pair.near)} - {_on(pair.far)}")


def configure(interface: Interface) -> Iterator[Message]:
    """Make it a port of its bridge, take it up and give it its addresses."""
    if interface.bridge is not None:
        yield enslave(interface, interface.bridge)
    yield set_up(interface.index, f"taking {_on(interface)} up", up=True)
    for address in interface.addresses:
        yield _address(interface, address)


def loopback_up() -> Message:
    """Take `lo` up."""
    return set_up(_LOOPBACK_INDEX, "taking lo up", up=True)


def set_up(index: int, what: str, *, up: bool) -> Message:
    """Take an interface up or down."""
    link = ifinfmsg()
    link["index"] = index
    link["flags"] = _IFF_UP if up else 0
    link["change"] = _IFF_UP
    return _message(_RTM_SETLINK, 0, link, what)


def enslave(interface: Interface, bridge_index: int) -> Message:
    """Move an interface to a bridge in one step, also if it is a port of another one now."""
    link = ifinfmsg()
    link["index"] = interface.index
    link["attrs"] = [("IFLA_MASTER", bridge_index)]
    return _message(_RTM_SETLINK, 0, link, f"moving {_on(interface)} to its bridge")


def default_route(gateway: IPv4Address, node: str) -> Message:
    """A default route in the main table."""
    route = rtmsg()
    route["family"] = socket.AF_INET
    route["table"] = _RT_TABLE_MAIN
    route["proto"] = _RTPROT_STATIC
    route["type"] = _RTN_UNICAST
    route["attrs"] = [("RTA_GATEWAY", str(gateway))]
    return _message(_RTM_NEWROUTE, _NEW, route, f"the default route of {node}")


def dump_links() -> Message:
    """Ask for all links of the namespace."""
    return _message(_RTM_GETLINK, NLM_F_DUMP, ifinfmsg(), "reading the links")


def get_link(index: int) -> Message:
    """Ask for one link."""
    link = ifinfmsg()
    link["index"] = index
    return _message(_RTM_GETLINK, 0, link, "reading a link")


def parse_running(body: bytes) -> bool:
    """Whether a link is ready to carry packets (IFF_RUNNING)."""
    return bool(_IFINFOMSG.unpack_from(body)[3] & _IFF_RUNNING)


def parse_master(body: bytes) -> tuple[int, int]:
    """A link of a dump: its index and that of the bridge that it is a port of (0: none)."""
    index = _IFINFOMSG.unpack_from(body)[2]
    for type_, payload in attributes(body, _IFINFOMSG.size):
        if type_ == _IFLA_MASTER:
            return index, int(_U32.unpack(payload)[0])
    return index, 0


def _link(interface: Interface) -> Any:  # noqa: ANN401 - pyroute2 is untyped
    link = ifinfmsg()
    for key, value in _end(interface).items():
        link[key] = value
    return link


def _end(interface: Interface) -> dict[str, Any]:
    names: _Attributes = [("IFLA_IFNAME", interface.name)]
    if interface.mac is not None:
        names.append(("IFLA_ADDRESS", interface.mac))
    return {"index": interface.index, "attrs": names}


def _kind(kind: str, options: _Attributes) -> tuple[str, Any]:
    data = ("IFLA_INFO_DATA", {"attrs": options})
    return "IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", kind), data]}


def _address(interface: Interface, address: IPv4Interface) -> Message:
    message = ifaddrmsg()
    message["family"] = socket.AF_INET
    message["prefixlen"] = address.network.prefixlen
    message["index"] = interface.index
    message["attrs"] = [
        ("IFA_LOCAL", str(address.ip)),
        ("IFA_ADDRESS", str(address.ip)),
        ("IFA_BROADCAST", str(address.network.broadcast_address)),
    ]
    return _message(_RTM_NEWADDR, _NEW, message, f"the address {address} of {_on(interface)}")


def _on(interface: Interface) -> str:
    return f"{interface.name} in {interface.node}"


def _message(type_: int, flags: int, message: Any, what: str) -> Message:  # noqa: ANN401 - pyroute2 is untyped
    return Message(type_, flags, encode(message), what)
