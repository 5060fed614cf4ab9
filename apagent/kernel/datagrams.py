"""Many datagrams of a socket in one system call.

The kernel sends every conntrack event in a datagram of its own. A `recv` for each costs more than
all that Python does with it, so they are fetched by recvmmsg(2), which Python doesn't offer and
ctypes calls: a hundred events for little more than the price of one. In the same way all peers are
probed, ten times a second, by sendmmsg(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Callable, Sequence


class Iovec(ctypes.Structure):
    """struct iovec (uio.h)."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class Msghdr(ctypes.Structure):
    """struct msghdr (recvmsg(2))."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint),
        ("iov", ctypes.c_void_p),
        ("iov_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class Mmsghdr(ctypes.Structure):
    """struct mmsghdr (recvmmsg(2)); `length` is what was received or sent."""

    _fields_ = (("message", Msghdr), ("length", ctypes.c_uint))


_SOCKET_ADDRESS = struct.Struct("=HH4s8x")
"""struct sockaddr_in (ip(7)), without a port."""
_WORD = ctypes.sizeof(ctypes.c_uint)
_STRIDE = ctypes.sizeof(Mmsghdr) // _WORD
_RECEIVED = Mmsghdr.length.offset // _WORD


class BatchReceiver:
    """Receives up to `slots` datagrams at once, each into a slot of `size` bytes of `buffer`."""

    def __init__(self, slots: int, size: int) -> None:
        self.size = size
        self.buffer = bytearray(slots * size)
        """Datagram n starts at n times `size`; what it holds is replaced by the next call."""
        self._slots = slots
        self._headers = (Mmsghdr * slots)()
        self._iovecs = (Iovec * slots)()
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))
        for slot, (header, iovec) in enumerate(zip(self._headers, self._iovecs, strict=True)):
            iovec.base, iovec.length = start + slot * size, size
            message = header.message
            message.iov, message.iov_count = ctypes.addressof(iovec), 1
        self._lengths = memoryview(self._headers).cast("B").cast("I")[_RECEIVED::_STRIDE]
        self._recvmmsg: Callable[..., int] = ctypes.CDLL(None, use_errno=True).recvmmsg

    def receive(self, source: socket.socket) -> list[int]:
        """The lengths of the datagrams that were waiting; empty: none. Raises OSError.

        A length is that of the datagram, also where the slot was too small for it.
        """
        flags = socket.MSG_DONTWAIT | socket.MSG_TRUNC
        count = self._recvmmsg(source.fileno(), self._headers, self._slots, flags, None)
        if count < 0:
            code = ctypes.get_errno()
            if code in (errno.EAGAIN, errno.EINTR):
                return []
            raise OSError(code, os.strerror(code))
        return self._lengths[:count].tolist()


class BatchSender:
    """Sends the same `size` bytes to many IPv4 hosts at once: what is in `payload` then."""

    def __init__(self, size: int) -> None:
        self.payload = bytearray(size)
        self._iovec = Iovec(ctypes.addressof(ctypes.c_char.from_buffer(self.payload)), size)
        self._hosts: tuple[bytes, ...] = ()
        self._addresses = bytearray()
        self._headers = (Mmsghdr * 0)()
        self._sendmmsg: Callable[..., int] = ctypes.CDLL(None, use_errno=True).sendmmsg

    def send(self, by: socket.socket, hosts: Sequence[bytes]) -> tuple[int, OSError | None]:
        """Send to each (an address of 4 bytes): to how many it went, and why not to the last other.

        Who can't be sent to doesn't keep the others.
        """
        if tuple(hosts) != self._hosts:
            self._address(tuple(hosts))
        total, next_, sent, refusal = len(hosts), 0, 0, None
        while next_ < total:
            rest = ctypes.byref(self._headers, next_ * ctypes.sizeof(Mmsghdr))
            count = self._sendmmsg(by.fileno(), rest, total - next_, 0)
            if count < 0:
                # The first of the rest is what it failed at.
                code = ctypes.get_errno()
                refusal, count = OSError(code, os.strerror(code)), 1
            else:
                sent += count
            next_ += count
        return sent, refusal

    def _address(self, hosts: tuple[bytes, ...]) -> None:
        """Make a header for each; mostly they are those of the last time."""
        self._hosts = hosts
        self._addresses = bytearray().join(
            _SOCKET_ADDRESS.pack(socket.AF_INET, 0, host) for host in hosts
        )
        self._headers = (Mmsghdr * len(hosts))()
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._addresses)) if hosts else 0
        for number, header in enumerate(self._headers):
            message = header.message
            message.name = start + number * _SOCKET_ADDRESS.size
            message.name_length = _SOCKET_ADDRESS.size
            message.iov, message.iov_count = ctypes.addressof(self._iovec), 1
