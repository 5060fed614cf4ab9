"""How people write MAC addresses and IPv4 addresses."""

from __future__ import annotations

import re
from ipaddress import AddressValueError, IPv4Address

import netaddr

from apagent.core.model import Mac

_DOTTED_QUAD = re.compile(r"\d+(\.\d+){3}")
_MAC = re.compile(
    r"([0-9a-f]{1,2}[:-]){5}[0-9a-f]{1,2}"
    r"|[0-9a-f]{4}([.:-][0-9a-f]{4}){2}"
    r"|[0-9a-f]{6}-?[0-9a-f]{6}",
    re.IGNORECASE,
)
"""netaddr alone would take 10.77.0, a mistyped IPv4 address, for a MAC."""
_GROUP_BIT = 0x01
"""Of a MAC's first octet (IEEE 802, clause 8.2)."""


def parse_mac(text: str) -> Mac:
    """A client's MAC in any usual notation: colons, hyphens, Cisco's dots, or twelve bare digits.

    Raises ValueError.
    """
    if _MAC.fullmatch(text) is None:
        raise ValueError(f"{text!r} is no MAC address (like 02:00:5e:10:00:01)")
    eui = netaddr.EUI(text, version=48)
    if eui.words[0] & _GROUP_BIT:
        raise ValueError(f"{text!r} is a group address, which no client has")
    if not any(eui.words):
        raise ValueError(f"{text!r} is no client's address")
    return Mac(eui.format(netaddr.mac_unix_expanded))


def parse_address(text: str) -> IPv4Address:
    """An IPv4 address. Raises ValueError."""
    try:
        return IPv4Address(text)
    except AddressValueError:
        raise ValueError(f"{text!r} is no IPv4 address (like 10.77.0.5)") from None


def parse_client(text: str) -> Mac | IPv4Address:
    """What names a client: its MAC or its IPv4 address. Raises ValueError."""
    if _DOTTED_QUAD.fullmatch(text):
        return parse_address(text)
    if _MAC.fullmatch(text) is None:
        raise ValueError(f"{text!r} is neither a MAC address nor an IPv4 address")
    return parse_mac(text)
