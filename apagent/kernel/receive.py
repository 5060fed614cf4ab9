"""Many datagrams of a socket in one system call.

The kernel sends every conntrack event in a datagram of its own. A `recv` for each costs more than
all that Python does with it, so they are fetched by recvmmsg(2), which Python doesn't offer and
ctypes calls: a hundred events for little more than the price of one.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Callable


class _Iovec(ctypes.Structure):
    """struct iovec (uio.h)."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Msghdr(ctypes.Structure):
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


class _Mmsghdr(ctypes.Structure):
    """struct mmsghdr (recvmmsg(2))."""

    _fields_ = (("message", _Msghdr), ("received", ctypes.c_uint))


_WORD = ctypes.sizeof(ctypes.c_uint)
_STRIDE = ctypes.sizeof(_Mmsghdr) // _WORD
_RECEIVED = _Mmsghdr.received.offset // _WORD


class BatchReceiver:
    """Receives up to `slots` datagrams at once, each into a slot of `size` bytes of `buffer`."""

    def __init__(self, slots: int, size: int) -> None:
        self.size = size
        self.buffer = bytearray(slots * size)
        """Datagram n starts at n times `size`; what it holds is replaced by the next call."""
        self._slots = slots
        self._headers = (_Mmsghdr * slots)()
        self._iovecs = (_Iovec * slots)()
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
