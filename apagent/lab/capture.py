"""Looks for packets that must not be there.

The filter runs in the kernel (classic BPF on an AF_PACKET socket), so at any packet rate nothing
but what is looked for reaches the socket, and the kernel counts it: no packet is missed because
this process is slow. A count is exact; of the packets themselves, those that fit the socket's
buffer are kept as evidence.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct
from collections.abc import Iterable
from ipaddress import IPv4Network
from types import TracebackType
from typing import NamedTuple, Self

from apagent.lab import namespaces

_ETH_P_ALL = 3
_ETH_P_IP = 0x0800
_SO_ATTACH_FILTER = 26
_SO_RCVBUFFORCE = 33
_SOL_PACKET = 263
_PACKET_STATISTICS = 6
_STATISTICS = struct.Struct("=II")
_BUFFER = 1 << 20
_SNAPLEN = 256

_INSTRUCTION = struct.Struct("=HBBI")
"""struct sock_filter (linux/filter.h): code, jump if true, jump if false, operand."""
_LOAD_HALF, _LOAD_WORD, _AND, _JUMP_EQUAL, _RETURN = 0x28, 0x20, 0x54, 0x15, 0x06
_ETHERTYPE, _SOURCE, _DESTINATION = 12, 26, 30
"""Offsets in an Ethernet frame that carries IPv4."""

Program = tuple[tuple[int, int, int, int], ...]


def touching(prefix: IPv4Network) -> Program:
    """Pass IPv4 packets from or to an address of `prefix`; not ARP."""
    mask, network = int(prefix.netmask), int(prefix.network_address)
    return (
        (_LOAD_HALF, 0, 0, _ETHERTYPE),
        (_JUMP_EQUAL, 0, 7, _ETH_P_IP),
        (_LOAD_WORD, 0, 0, _SOURCE),
        (_AND, 0, 0, mask),
        (_JUMP_EQUAL, 3, 0, network),
        (_LOAD_WORD, 0, 0, _DESTINATION),
        (_AND, 0, 0, mask),
        (_JUMP_EQUAL, 0, 1, network),
        (_RETURN, 0, 0, _SNAPLEN),
        (_RETURN, 0, 0, 0),
    )


class Packet(NamedTuple):
    """A packet that was found, cut after 256 bytes of its frame."""

    interface: str
    frame: bytes

    def __str__(self) -> str:
        addresses = self.frame[_SOURCE:_DESTINATION], self.frame[_DESTINATION : _DESTINATION + 4]
        source, destination = map(socket.inet_ntoa, addresses)
        return f"{source} > {destination} protocol {self.frame[23]} on {self.interface}"


class Capture:
    """Watches interfaces of a namespace, in both directions, from its making to its close.

    Raises OSError if there is no such interface.
    """

    def __init__(self, namespace: str, interfaces: Iterable[str], program: Program) -> None:
        self._sockets: dict[str, socket.socket] = {}
        self._found = 0
        self._packets: list[Packet] = []
        with contextlib.ExitStack() as stack, namespaces.inside(namespace):
            for interface in interfaces:
                self._sockets[interface] = stack.enter_context(_listen(interface, program))
            self._open = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        type_: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def count(self) -> int:
        """How many packets were found, those included that no longer fitted the buffer."""
        for listener in self._sockets.values():
            found, _ = _STATISTICS.unpack(
                listener.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, _STATISTICS.size)
            )
            self._found += found  # reading it sets it to zero
        return self._found

    def packets(self) -> list[Packet]:
        """The first packets that were found, as evidence."""
        for interface, listener in self._sockets.items():
            # A cable that was pulled is reported once, before what else there is to read.
            listener.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            with contextlib.suppress(BlockingIOError):
                while True:
                    self._packets.append(Packet(interface, listener.recv(_SNAPLEN)))
        return list(self._packets)

    def close(self) -> None:
        """End it; `count` and `packets` go on to say what was found."""
        self.count()
        self.packets()
        self._sockets.clear()
        self._open.close()


def _listen(interface: str, program: Program) -> socket.socket:
    # No protocol until the filter is there, or unfiltered packets would come in between.
    listener = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK)
    try:
        _attach(listener, program)
        with contextlib.suppress(PermissionError):  # the initial user namespace's privilege
            listener.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        listener.bind((interface, _ETH_P_ALL))
    except BaseException:
        listener.close()
        raise
    return listener


def _attach(listener: socket.socket, program: Program) -> None:
    code = b"".join(_INSTRUCTION.pack(*instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: number of instructions, then (aligned) their address.
    listener.setsockopt(
        socket.SOL_SOCKET,
        _SO_ATTACH_FILTER,
        struct.pack("@HP", len(program), ctypes.addressof(buffer)),
    )
