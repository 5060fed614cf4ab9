"""ARP announcements: what clients, and routers beyond an uplink, should believe about who is where.

A client that roams may hold stale entries: one for a client that was its neighbour and is behind
the gateway now, or none for the gateway, if it flushed its cache when its carrier dropped. An
announcement mends an entry that exists and completes one that is being asked for (RFC 826, packet
reception; RFC 5944, section 4.6, for mobile nodes).
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable
from ipaddress import IPv4Address

from apagent.core.model import Mac
from apagent.errors import KernelFault

ETH_P_ARP = 0x0806
_BROADCAST = b"\xff" * 6
_NO_MAC = bytes(6)
_NO_ADDRESS = IPv4Address(0)
_REQUEST, _REPLY = 1, 2
_FRAME = struct.Struct(">6s6sHHHBBH6s4s6s4s")
_ETHERNET, _IPV4, _MAC_SIZE, _IPV4_SIZE = 1, 0x0800, 6, 4
SENDER_MAC, SENDER, TARGET = slice(22, 28), slice(28, 32), slice(38, 42)
"""Where an ARP frame on Ethernet has its sender's MAC and address, and the target's address."""
_ARPHRD_ETHER = 1
"""linux/if_arp.h"""


class ArpAnnouncer:
    """Sends as the AP on one interface. Raises KernelFault where that can't be done."""

    def __init__(self, interface: str) -> None:
        self._interface = interface
        try:
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC)
        except OSError as error:
            raise self._fault(error) from None

    def tell(self, client: Mac, address: IPv4Address, ours: Iterable[IPv4Address]) -> None:
        """Tell one client that we answer for the addresses `ours`."""
        to = bytes.fromhex(client.replace(":", ""))
        us = self._bind()
        for announced in ours:
            self._send(us, to, _REPLY, announced, to, address)

    def tell_all(self, addresses: Iterable[IPv4Address]) -> None:
        """Tell everybody here that we answer for `addresses` (a gratuitous request each)."""
        us = self._bind()
        for address in addresses:
            self._send(us, _BROADCAST, _REQUEST, address, _NO_MAC, address)

    def ask(self, address: IPv4Address) -> None:
        """Ask who uses an address, without saying that we do (RFC 5227, section 2.1.1)."""
        self._send(self._bind(), _BROADCAST, _REQUEST, _NO_ADDRESS, _NO_MAC, address)

    def ask_client(self, client: Mac, address: IPv4Address, us: IPv4Address) -> None:
        """Ask one client, as `us`, for its own address."""
        to = bytes.fromhex(client.replace(":", ""))
        self._send(self._bind(), to, _REQUEST, us, _NO_MAC, address)

    def mac(self) -> bytes:
        """The interface's own MAC."""
        return self._bind()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _bind(self) -> bytes:
        """Find the interface, which may have been made anew or changed its MAC; its MAC."""
        try:
            self._socket.bind((self._interface, 0))
        except OSError as error:
            raise self._fault(error) from None
        _, _, _, kind, mac = self._socket.getsockname()
        if kind != _ARPHRD_ETHER:
            raise KernelFault(f"ARP on {self._interface}: it is no Ethernet interface")
        return bytes(mac)

    def _send(
        self,
        us: bytes,
        to: bytes,
        operation: int,
        sender: IPv4Address,
        target_mac: bytes,
        target: IPv4Address,
    ) -> None:
        frame = _FRAME.pack(
            to,
            us,
            ETH_P_ARP,
            _ETHERNET,
            _IPV4,
            _MAC_SIZE,
            _IPV4_SIZE,
            operation,
            us,
            sender.packed,
            target_mac,
            target.packed,
        )
        try:
            self._socket.send(frame)
        except OSError as error:
            raise self._fault(error) from None

    def _fault(self, error: OSError) -> KernelFault:
        need = "; the agent needs CAP_NET_RAW" if error.errno == errno.EPERM else ""
        return KernelFault(f"ARP on {self._interface}: {error.strerror}{need}", error.errno or 0)
