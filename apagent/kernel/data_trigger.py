"""The data trigger: packets that our nftables rule logs, because their client is served elsewhere.

Such a packet says before anything else that the client has come here. Numbers and layouts:
linux/netfilter/nfnetlink_log.h.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address

from apagent.core.domain import Domain
from apagent.core.events import ClientSeen, Source
from apagent.core.model import Mac
from apagent.errors import KernelFault
from apagent.kernel.interfaces import ClientInterfaces
from apagent.kernel.wire import Message, Netlink, attribute, attributes, split

_NETLINK_NETFILTER = 12
_PACKET = 4 << 8
_CONFIG = (4 << 8) | 1
_NFGENMSG = struct.Struct(">BBH")

_CFG_CMD, _CFG_MODE, _CFG_QTHRESH = 1, 2, 5
_CMD_BIND = 1
_MODE = struct.Struct(">IBx")
_COPY_PACKET = 2
_IPV4_HEADER = 20
_IPV4_SOURCE = slice(12, 16)

_IFINDEX_INDEV, _HWADDR, _PAYLOAD = 4, 8, 9
_HW = struct.Struct(">HH8s")
_MAC_SIZE = 6
_BUFFER = 1 << 20
_MESSAGE_SIZE = 1 << 16


class DataTrigger:
    """The nflog group of `domain`, read as clients seen.

    Raises KernelFault (EPERM) if another program has the group.
    """

    def __init__(self, domain: Domain, interfaces: ClientInterfaces) -> None:
        self._interfaces = interfaces
        self._buffer = bytearray(_MESSAGE_SIZE)
        self._netlink = Netlink(_NETLINK_NETFILTER, buffer=_BUFFER)
        try:
            self._netlink.request(_bind(domain.nflog_group))
        except KernelFault as fault:
            self._netlink.close()
            if fault.errno not in (errno.EPERM, errno.EBUSY):
                raise
            text = f"{fault}: another program reads it; give kernel.nflog_group another value"
            raise KernelFault(text, fault.errno) from None

    def fileno(self) -> int:
        """Readable when packets are waiting."""
        return self._netlink.fileno()

    def read(self) -> Iterator[ClientSeen]:
        """The clients whose packets are waiting. Raises EventsLost after an overflow."""
        while size := self._netlink.events(self._buffer):
            for type_, _, _, body in split(bytes(memoryview(self._buffer)[:size])):
                seen = self._seen(body) if type_ == _PACKET else None
                if seen is not None:
                    yield seen

    def close(self) -> None:
        """Close the socket; the group is free again."""
        self._netlink.close()

    def _seen(self, body: bytes) -> ClientSeen | None:
        found = dict(attributes(body, _NFGENMSG.size))
        payload, hardware = found.get(_PAYLOAD, b""), found.get(_HWADDR, b"")
        if len(payload) < _IPV4_HEADER or len(hardware) < _HW.size:
            return None
        size, _, lladdr = _HW.unpack_from(hardware)
        ifindex = int.from_bytes(found.get(_IFINDEX_INDEV, b""), "big")
        address = IPv4Address(payload[_IPV4_SOURCE])
        network = self._interfaces.network_of_client(ifindex, address)
        if network is None or size != _MAC_SIZE:
            return None
        mac = Mac(lladdr[:_MAC_SIZE].hex(":"))
        return ClientSeen(network.name, mac, Source.DATA, address)


def _bind(group: int) -> Iterator[Message]:
    """Claim the group and have every packet's IPv4 header reported at once.

    Without a queue threshold of 1 the kernel collects packets for up to a second.
    """
    settings = (
        (_CFG_CMD, bytes([_CMD_BIND])),
        (_CFG_MODE, _MODE.pack(_IPV4_HEADER, _COPY_PACKET)),
        (_CFG_QTHRESH, struct.pack(">I", 1)),
    )
    for type_, value in settings:
        body = _NFGENMSG.pack(0, 0, group) + attribute(type_, value)
        yield Message(_CONFIG, 0, body, f"nflog group {group}")
