"""What the machine must have before the agent starts, and what the underlay leaves room for."""

from __future__ import annotations

import errno
import re
import socket
import struct
from ipaddress import IPv4Address
from pathlib import Path

from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from apagent.core.domain import Domain
from apagent.errors import KernelFault
from apagent.kernel import links, sysctl
from apagent.kernel.wire import NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, Message, Netlink, encode

_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13}
"""Numbers in linux/capability.h; raw for the ARP announcements."""
_NETLINK_ROUTE, _NETLINK_NETFILTER = 0, 12
_NFGENMSG = struct.Struct("=BBH")
_CTNETLINK_GET_STATS = (1 << 8) | 5
"""NFNL_SUBSYS_CTNETLINK and IPCTNL_MSG_CT_GET_STATS (linux/netfilter/nfnetlink_conntrack.h)."""
_NFTABLES_GETGEN = (10 << 8) | 16
"""NFNL_SUBSYS_NFTABLES and NFT_MSG_GETGEN (linux/netfilter/nf_tables.h)."""
_PROBE_DEVICE = "apagent-probe"


def missing_needs(domain: Domain) -> list[str]:
    """What the machine lacks, a sentence each with what to do; empty: all is there."""
    missing = [
        f"{name} is missing: run the agent as root or grant it that capability."
        for name, number in _CAPABILITIES.items()
        if not _is_capable(number)
    ]
    if missing:
        return missing
    return [*_missing_in_kernel(), *_missing_forwarding(), *missing_interfaces(domain)]


def underlay_mtu(address: IPv4Address) -> int:
    """MTU in bytes of the interface that holds `address`.

    Raises KernelFault if no interface does.
    """
    netlink = Netlink(_NETLINK_ROUTE)
    try:
        indexes = {a.ifindex for a in links.addresses(netlink) if a.local == address}
        mtus = [link.mtu for link in links.links(netlink).values() if link.ifindex in indexes]
    finally:
        netlink.close()
    if not mtus:
        text = f"tunnel.underlay: no interface has the address {address}: add it or correct the key"
        raise KernelFault(text, errno.EADDRNOTAVAIL)
    return min(mtus)


def _is_capable(number: int) -> bool:
    status = Path("/proc/thread-self/status").read_text()
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return effective is not None and bool(int(effective[1], 16) >> number & 1)


def _missing_in_kernel() -> list[str]:
    missing: list[str] = []
    if not _netfilter_answers(_NFTABLES_GETGEN):
        missing.append("The kernel has no nf_tables: load or build CONFIG_NF_TABLES.")
    # The question loads the module, and with it come the sysctls.
    if not _netfilter_answers(_CTNETLINK_GET_STATS):
        missing.append("The kernel has no conntrack netlink: load or build CONFIG_NF_CT_NETLINK.")
    elif sysctl.read(sysctl.CONNTRACK_EVENTS) is None:
        missing.append("The kernel reports no conntrack events: build CONFIG_NF_CONNTRACK_EVENTS.")
    if not _knows_vxlan():
        missing.append("The kernel has no VXLAN devices: load or build CONFIG_VXLAN.")
    return missing


def _netfilter_answers(type_: int) -> bool:
    """Whether the netfilter subsystem that `type_` asks is there."""
    body = _NFGENMSG.pack(socket.AF_UNSPEC, 0, 0)
    try:
        netlink = Netlink(_NETLINK_NETFILTER)
    except KernelFault:
        return False
    try:
        return bool(list(netlink.dump(Message(type_, NLM_F_ACK, body))))
    except KernelFault:
        return False
    finally:
        netlink.close()


def _knows_vxlan() -> bool:
    """Ask for a VXLAN device without its VNI: no kernel makes it, but one refuses the kind."""
    message = ifinfmsg()
    message["attrs"] = [
        ("IFLA_IFNAME", _PROBE_DEVICE),
        ("IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", "vxlan")]}),
    ]
    probe = Message(links.RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, encode(message))
    netlink = Netlink(_NETLINK_ROUTE)
    try:
        netlink.request([probe])
    except KernelFault as fault:
        return fault.errno != errno.EOPNOTSUPP
    finally:
        netlink.close()
    return True


def _missing_forwarding() -> list[str]:
    if sysctl.read(sysctl.IP_FORWARD) == 1:
        return []
    return ["IPv4 forwarding is off: set the sysctl net.ipv4.ip_forward to 1."]


def missing_interfaces(domain: Domain) -> list[str]:
    """The configured interfaces that don't exist, a sentence each with the key's full name."""
    present = {name for _, name in socket.if_nameindex()}
    return [
        f"networks[{i}].{key}: there is no interface {name}: create it or correct the key."
        for i, network in enumerate(domain.networks)
        for key, name in (
            ("client_interface", network.client_interface),
            ("uplink", network.uplink),
        )
        if name not in present
    ]
