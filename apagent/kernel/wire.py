"""Netlink requests in one system call: whole batches out, acknowledgements and dumps in.

The kernel works a netlink request off inside `sendmsg`, so its answers wait in the socket when the
call returns. A synchronous socket is therefore all that commands need: no task, no callback, and a
batch is applied when `request` returns. pyroute2's message classes encode and decode; its sockets,
which serve one request at a time, are not used.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from apagent.errors import EventsLost, KernelFault

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP = 0x300
NLM_F_REPLACE = 0x100
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLM_F_ACK_TLVS = 0x200
NLM_F_CAPPED = 0x100
NLM_F_DUMP_INTR = 0x10

_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_NLMSG_OVERRUN = 4
_NLMSGERR_ATTR_MSG = 1

_SOL_NETLINK = 270
_NETLINK_ADD_MEMBERSHIP = 1
_NETLINK_CAP_ACK = 10
_NETLINK_EXT_ACK = 11
_SO_RCVBUFFORCE = 33
_SO_SNDBUFFORCE = 32

HEADER = struct.Struct("=IHHII")
"""struct nlmsghdr: length, type, flags, sequence number, port id (linux/netlink.h)."""
_ERROR_CODE = struct.Struct("=i")
_ATTR = struct.Struct("=HH")

_ANSWER_BUFFER = 1 << 16


@dataclass(frozen=True, slots=True)
class Message:
    """A netlink message to send: `what` names it in an error text."""

    type: int
    flags: int
    body: bytes
    what: str = ""


def encode(message: Any) -> bytes:  # noqa: ANN401 - pyroute2 is untyped
    """The body (without netlink header) of a pyroute2 message object."""
    message.reset()
    message.encode()
    return bytes(message.data[HEADER.size :])


class Netlink:
    """A netlink socket in the current network namespace.

    `groups` are multicast groups to join; `buffer` is the wanted receive buffer in bytes (the
    kernel may grant less without CAP_NET_ADMIN in the initial user namespace).
    """

    def __init__(self, family: int, groups: Sequence[int] = (), buffer: int = 1 << 20) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, family
        )
        self._sequence = int.from_bytes(os.urandom(3), "big")
        for force, plain in (
            (_SO_RCVBUFFORCE, socket.SO_RCVBUF),
            (_SO_SNDBUFFORCE, socket.SO_SNDBUF),
        ):
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, force, buffer)
            except PermissionError:
                self._socket.setsockopt(socket.SOL_SOCKET, plain, buffer)
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
        self._socket.bind((0, 0))
        for group in groups:
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)

    @property
    def granted_buffer(self) -> int:
        """The receive buffer that the kernel granted, in bytes."""
        return self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)

    def fileno(self) -> int:
        """For an event loop."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def request(self, messages: Iterable[Message], *, ignore: frozenset[int] = frozenset()) -> None:
        """Send `messages` in one call and wait for the answer to each that asks for one.

        Every message is tried, also after one has failed (rtnetlink has no transactions). Raises
        KernelFault for the first failure whose errno is not in `ignore`.
        """
        sent, waiting = self._pack(messages)
        if not sent:
            return
        self._send(sent)
        fault: KernelFault | None = None
        while waiting:
            for sequence, code, text in self._answers():
                message = waiting.pop(sequence, None)
                if message is None or code == 0 or code in ignore or fault is not None:
                    continue
                fault = KernelFault(f"{message.what}: {_reason(code, text)}", code)
        if fault is not None:
            raise fault

    def transaction(self, begin: Message, messages: Sequence[Message], end: Message) -> None:
        """Send a transaction between `begin` and `end` (nfnetlink batch): all or nothing.

        The last of `messages` is acknowledged; any may be answered with an error. Raises
        KernelFault for the first error.
        """
        *head, last = messages
        packed, waiting = self._pack(
            [begin, *head, Message(last.type, last.flags | NLM_F_ACK, last.body, last.what), end]
        )
        final = next(iter(waiting))
        self._send(packed)
        fault: KernelFault | None = None
        names = {final - len(messages) + 1 + i: m.what for i, m in enumerate(messages)}
        answered = False
        while not answered:
            for sequence, code, text in self._answers():
                if code != 0 and fault is None:
                    what = names.get(sequence, "nftables transaction")
                    fault = KernelFault(f"{what}: {_reason(code, text)}", code)
                answered = answered or sequence == final or code != 0
        self._drain()
        if fault is not None:
            raise fault

    def dump(self, message: Message) -> Iterator[bytes]:
        """Ask for a dump (or a single object) and yield the body of each message of the answer.

        Raises KernelFault; errno EINTR where the table changed under the dump so that it must be
        read again.
        """
        [sequence] = self._pack_one(message)
        interrupted = False
        done = False
        while not done:
            data = self._receive()
            for type_, flags, seq, body in split(data):
                if seq != sequence:
                    continue
                interrupted = interrupted or bool(flags & NLM_F_DUMP_INTR)
                if type_ in (_NLMSG_ERROR, _NLMSG_DONE):
                    code = -_ERROR_CODE.unpack_from(body)[0] if len(body) >= 4 else 0
                    if code:
                        raise KernelFault(f"{message.what}: {_reason(code, '')}", code)
                    done = True
                    break
                yield body
        if interrupted:
            raise KernelFault(f"{message.what}: the table changed while it was read", errno.EINTR)

    def events(self, buffer: bytearray) -> int:
        """Read waiting multicast messages into `buffer`; 0: nothing is waiting.

        Raises EventsLost if the socket overflowed.
        """
        try:
            return self._socket.recv_into(buffer, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                raise EventsLost(
                    "the kernel reported events faster than we read them", errno.ENOBUFS
                ) from None
            raise

    def _pack(self, messages: Iterable[Message]) -> tuple[bytes, dict[int, Message]]:
        parts: list[bytes] = []
        waiting: dict[int, Message] = {}
        for message in messages:
            self._sequence = (self._sequence + 1) & 0x7FFFFFFF
            parts.append(
                HEADER.pack(
                    HEADER.size + len(message.body),
                    message.type,
                    message.flags | NLM_F_REQUEST,
                    self._sequence,
                    0,
                )
            )
            parts.append(message.body)
            parts.append(b"\0" * (-len(message.body) % 4))
            if message.flags & NLM_F_ACK:
                waiting[self._sequence] = message
        return b"".join(parts), waiting

    def _pack_one(self, message: Message) -> list[int]:
        data, _ = self._pack([message])
        self._send(data)
        return [self._sequence]

    def _send(self, data: bytes) -> None:
        self._socket.sendto(data, (0, 0))

    def _receive(self) -> bytes:
        try:
            return self._socket.recv(_ANSWER_BUFFER)
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                raise EventsLost(
                    "the kernel's answers overflowed the socket", errno.ENOBUFS
                ) from None
            raise

    def _answers(self) -> Iterator[tuple[int, int, str]]:
        for type_, flags, sequence, body in split(self._receive()):
            if type_ == _NLMSG_ERROR:
                yield sequence, -_ERROR_CODE.unpack_from(body)[0], _extended_ack(flags, body)

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._socket.recv(_ANSWER_BUFFER, socket.MSG_DONTWAIT):
                pass


def split(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Split a datagram into its messages: type, flags, sequence number, body."""
    offset = 0
    while offset + HEADER.size <= len(data):
        length, type_, flags, sequence, _ = HEADER.unpack_from(data, offset)
        if length < HEADER.size:
            return
        yield type_, flags, sequence, data[offset + HEADER.size : offset + length]
        offset += (length + 3) & ~3


def attributes(data: bytes, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """The attributes (struct nlattr) in `data` from `offset`: type without flags, payload."""
    while offset + _ATTR.size <= len(data):
        length, type_ = _ATTR.unpack_from(data, offset)
        if length < _ATTR.size:
            return
        yield type_ & 0x3FFF, data[offset + _ATTR.size : offset + length]
        offset += (length + 3) & ~3


def attribute(type_: int, payload: bytes) -> bytes:
    """Pack one attribute, padded to 4 bytes."""
    return _ATTR.pack(_ATTR.size + len(payload), type_) + payload + b"\0" * (-len(payload) % 4)


def _reason(code: int, text: str) -> str:
    name = errno.errorcode.get(code, str(code))
    return f"{text} ({name})" if text else f"{os.strerror(code)} ({name})"


def _extended_ack(flags: int, body: bytes) -> str:
    """The kernel's own words on an error (NETLINK_EXT_ACK), or an empty string."""
    if not flags & NLM_F_ACK_TLVS:
        return ""
    offset = 4 + HEADER.size
    if not flags & NLM_F_CAPPED:
        (length,) = struct.unpack_from("=I", body, 4)
        offset = 4 + length
    for type_, payload in attributes(body, offset):
        if type_ == _NLMSGERR_ATTR_MSG:
            return payload.rstrip(b"\0").decode(errors="replace")
    return ""
