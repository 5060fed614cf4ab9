"""What happens to the elements of an AP's session maps, by the events that nf_tables sends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from apagent.core.model import NetworkName
from apagent.kernel.nft import messages
from apagent.kernel.nft.elements import ECHO_SIZE, FLOW_SIZE, SOCKET_SIZE, parse_elements
from apagent.kernel.nft.installed import listing
from apagent.kernel.nft.sets import Names
from apagent.kernel.wire import Netlink, attributes, split
from apagent.lab import namespaces
from apagent.lab.lab import Lab

_NETLINK_NETFILTER = 12
_NFNLGRP_NFTABLES = 7
_NEW_ELEMENT, _DELETE_ELEMENT = 0xA0C, 0xA0E
_LIST_SET = 2
_TABLE = "apagent"
_LAN = Names.of(NetworkName("lan"))
_KEY_SIZES = {_LAN.flows: FLOW_SIZE, _LAN.echoes: ECHO_SIZE, _LAN.sockets: SOCKET_SIZE}


class Change(NamedTuple):
    """An element of a session map that came or went."""

    map: str
    key: bytes
    added: bool


class MapChanges:
    """Collects from now on what changes in an AP's session maps, and knows what is in them now."""

    def __init__(self, lab: Lab, ap: str) -> None:
        with namespaces.inside(lab.namespace(ap)):
            self._events = Netlink(_NETLINK_NETFILTER, (_NFNLGRP_NFTABLES,), 1 << 22)
            with contextlib.closing(Netlink(_NETLINK_NETFILTER)) as netlink:
                self.present = {
                    (map_, key)
                    for map_, size in _KEY_SIZES.items()
                    for body in listing(netlink, messages.list_elements(_TABLE, map_))
                    for key, _ in parse_elements(body, size)
                }
        self._buffer = bytearray(1 << 16)

    def of_present(self) -> list[Change]:
        """The changes so far of what was there at the beginning."""
        return [change for change in self._read() if (change.map, change.key) in self.present]

    def close(self) -> None:
        """Close the socket."""
        self._events.close()

    def _read(self) -> Iterator[Change]:
        while size := self._events.events(self._buffer):
            for type_, _, _, body in split(bytes(self._buffer[:size])):
                if type_ in (_NEW_ELEMENT, _DELETE_ELEMENT):
                    map_ = dict(attributes(body, 4)).get(_LIST_SET, b"").rstrip(b"\0").decode()
                    for key, _ in parse_elements(body, _KEY_SIZES.get(map_, 0)):
                        yield Change(map_, key, added=type_ == _NEW_ELEMENT)
