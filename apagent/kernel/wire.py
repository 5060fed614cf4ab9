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
from dataclasses import dataclass, replace
from typing import Any

from apagent.errors import EventsLost, KernelFault
from apagent.kernel import packet_filter
from apagent.kernel.datagrams import BatchReceiver

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
_REQUESTS_A_CALL = 256
"""Each may be answered with an error that takes about 1 kB of the socket's memory, and an ordinary
user's socket (net.core.rmem_max) has some 400 kB."""
_DUMP_ATTEMPTS = 10
_LAST_SEQUENCE = 0xFFFFFFFF


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
    kernel may grant less without CAP_NET_ADMIN in the initial user namespace); `program` is a
    filter (apagent.kernel.packet_filter) for what comes in.
    """

    def __init__(
        self,
        family: int,
        groups: Sequence[int] = (),
        buffer: int = 1 << 20,
        program: bytes = b"",
    ) -> None:
        self._sequence = int.from_bytes(os.urandom(3), "big")
        self._notes: list[str] | None = None
        try:
            self._socket = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, family
            )
        except OSError as error:
            raise _fault(f"netlink family {family}", error) from None
        try:
            if program:
                packet_filter.attach(self._socket, program)
            self._set_up(groups, buffer)
        except OSError as error:
            self._socket.close()
            raise _fault(f"netlink family {family}, groups {tuple(groups)}", error) from None

    def _set_up(self, groups: Sequence[int], buffer: int) -> None:
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

    @property
    def port(self) -> int:
        """Our port id (netlink(7)): what we change is announced to others, and to us, with it."""
        port: int = self._socket.getsockname()[0]
        return port

    @contextlib.contextmanager
    def noting(self, notes: list[str]) -> Iterator[None]:
        """Add to `notes` what is changed within the block, by `Message.what`."""
        self._notes = notes
        try:
            yield
        finally:
            self._notes = None

    def fileno(self) -> int:
        """For an event loop."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def request(self, messages: Iterable[Message], *, ignore: frozenset[int] = frozenset()) -> None:
        """Send `messages`, some hundred a call, and wait until the kernel has worked them off.

        Every message is tried, also after one has failed (rtnetlink has no transactions). Raises
        KernelFault for the first failure whose errno is not in `ignore`.
        """
        sent = list(messages)
        for fault in self.attempt(sent).values():
            if fault.errno not in ignore:
                raise fault
        self._note(sent)

    def attempt(self, messages: Sequence[Message]) -> dict[int, KernelFault]:
        """Send `messages`, some hundred a call, and wait until the kernel has worked them off.

        Returns the failures, in order, by the message's position.
        """
        faults: dict[int, KernelFault] = {}
        for start in range(0, len(messages), _REQUESTS_A_CALL):
            chunk = messages[start : start + _REQUESTS_A_CALL]
            for position, fault in self._attempt_chunk(chunk):
                faults[start + position] = fault
        return faults

    def _attempt_chunk(self, messages: Sequence[Message]) -> Iterator[tuple[int, KernelFault]]:
        """Send `messages` in one call; the failures.

        Only the last one asks for an acknowledgement: errors are answered anyway, and in order.
        """
        sequences = self._send_acknowledged(messages)
        first = next(iter(sequences))
        answered = False
        while not answered:
            for sequence, code, text in self._answers():
                message = sequences.get(sequence)
                answered = answered or sequence == self._sequence
                if message is not None and code:
                    fault = KernelFault(f"{message.what}: {_reason(code, text)}", code)
                    yield sequence - first, fault

    def transaction(self, begin: Message, messages: Sequence[Message], end: Message) -> None:
        """Send a transaction between `begin` and `end` (nfnetlink batch): all or nothing.

        The last of `messages` is acknowledged; any may be answered with an error. Raises
        KernelFault for the first error.
        """
        sequences = self._send_acknowledged(messages, begin, end)
        final = next(reversed(sequences))
        fault: KernelFault | None = None
        answered = False
        while not answered:
            for sequence, code, text in self._answers():
                if code != 0 and fault is None:
                    message = sequences.get(sequence, begin)
                    fault = KernelFault(f"{message.what}: {_reason(code, text)}", code)
                answered = answered or sequence == final or code != 0
        self._drain()
        if fault is not None:
            raise fault
        self._note(messages)

    def dump(self, message: Message) -> Iterator[bytes]:
        """Ask for a dump (or a single object) and yield the body of each message of the answer.

        Raises KernelFault; errno EINTR where the table changed under the dump so that it must be
        read again.
        """
        if message.flags & NLM_F_DUMP != NLM_F_DUMP:
            # A single object comes without NLMSG_DONE; an acknowledgement ends the answer.
            message = replace(message, flags=message.flags | NLM_F_ACK)
        self._send(self._pack([message]))
        sequence = self._sequence
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
                        text = _extended_ack(flags, body) if type_ == _NLMSG_ERROR else ""
                        raise KernelFault(f"{message.what}: {_reason(code, text)}", code)
                    done = True
                    break
                yield body
        if interrupted:
            raise KernelFault(f"{message.what}: the table changed while it was read", errno.EINTR)

    def table(self, message: Message) -> list[bytes]:
        """The whole answer to a dump, read again where the table changed under it.

        Raises KernelFault; errno EINTR if it changed under every one of ten attempts.
        """
        for _ in range(_DUMP_ATTEMPTS - 1):
            try:
                return list(self.dump(message))
            except KernelFault as fault:
                if fault.errno != errno.EINTR:
                    raise
        return list(self.dump(message))

    def events(self, buffer: bytearray | memoryview) -> int:
        """Read waiting multicast messages into `buffer`; 0: nothing is waiting.

        Raises EventsLost if the socket overflowed or a datagram didn't fit `buffer`.
        """
        try:
            size = self._socket.recv_into(buffer, 0, socket.MSG_DONTWAIT | socket.MSG_TRUNC)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise _events_fault(error) from None
        if size > len(buffer):
            raise EventsLost(f"an event of {size} bytes didn't fit the buffer", errno.EMSGSIZE)
        return size

    def event_batch(self, receiver: BatchReceiver) -> list[int]:
        """Read waiting multicast messages into `receiver`; their lengths, empty: nothing waits.

        Raises EventsLost if the socket overflowed or a datagram didn't fit.
        """
        try:
            lengths = receiver.receive(self._socket)
        except OSError as error:
            raise _events_fault(error) from None
        if lengths and max(lengths) > receiver.size:
            raise EventsLost(f"an event of {max(lengths)} bytes didn't fit", errno.EMSGSIZE)
        return lengths

    def _send_acknowledged(
        self, messages: Sequence[Message], begin: Message | None = None, end: Message | None = None
    ) -> dict[int, Message]:
        """Send `messages` in one call; their sequence numbers. The last one is acknowledged."""
        *head, last = messages
        last = replace(last, flags=last.flags | NLM_F_ACK)
        before = [] if begin is None else [begin]
        after = [] if end is None else [end]
        data = self._pack([*before, *head, last, *after])
        first = self._sequence - len(after) - len(messages) + 1
        self._send(data)
        return dict(enumerate(messages, first))

    def _note(self, messages: Sequence[Message]) -> None:
        if self._notes is not None:
            self._notes += (message.what for message in messages)

    def _pack(self, messages: Sequence[Message]) -> bytes:
        """`messages` on the wire; the last one's sequence number is `_sequence`."""
        if self._sequence + len(messages) > _LAST_SEQUENCE:
            self._sequence = 0
        parts: list[bytes] = []
        for message in messages:
            self._sequence += 1
            length = HEADER.size + len(message.body)
            flags = message.flags | NLM_F_REQUEST
            parts.append(HEADER.pack(length, message.type, flags, self._sequence, 0))
            parts.append(message.body)
            parts.append(b"\0" * (-length % 4))
        return b"".join(parts)

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendto(data, (0, 0))
        except OSError as error:
            # Only a change of the table's layout is larger than the buffer that we have asked for.
            if error.errno == errno.EMSGSIZE and self._make_room(len(data)):
                self._send(data)
                return
            raise _fault(f"netlink request of {len(data)} bytes", error) from None

    def _make_room(self, size: int) -> bool:
        """Ask for a larger buffer, for a request of `size` bytes; whether it was granted."""
        before = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        with contextlib.suppress(PermissionError):
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, size)
        return self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) > before

    def _receive(self) -> bytes:
        try:
            return self._socket.recv(_ANSWER_BUFFER)
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                raise EventsLost(
                    "the kernel's answers overflowed the socket", errno.ENOBUFS
                ) from None
            raise _fault("netlink answer", error) from None

    def _answers(self) -> Iterator[tuple[int, int, str]]:
        for type_, flags, sequence, body in split(self._receive()):
            if type_ == _NLMSG_ERROR:
                yield sequence, -_ERROR_CODE.unpack_from(body)[0], _extended_ack(flags, body)

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._socket.recv(_ANSWER_BUFFER, socket.MSG_DONTWAIT):
                pass


def split(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Split a datagram into its messages: type, flags, sequence number, body.

    Ends at the first message that is cut short.
    """
    offset = 0
    while offset + HEADER.size <= len(data):
        length, type_, flags, sequence, _ = HEADER.unpack_from(data, offset)
        if length < HEADER.size or offset + length > len(data):
            return
        yield type_, flags, sequence, data[offset + HEADER.size : offset + length]
        offset += (length + 3) & ~3


def attributes(data: bytes, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """The attributes (struct nlattr) in `data` from `offset`: type without flags, payload.

    Ends at the first attribute that is cut short.
    """
    while offset + _ATTR.size <= len(data):
        length, type_ = _ATTR.unpack_from(data, offset)
        if length < _ATTR.size or offset + length > len(data):
            return
        yield type_ & 0x3FFF, data[offset + _ATTR.size : offset + length]
        offset += (length + 3) & ~3


def attribute(type_: int, payload: bytes) -> bytes:
    """Pack one attribute, padded to 4 bytes."""
    return _ATTR.pack(_ATTR.size + len(payload), type_) + payload + b"\0" * (-len(payload) % 4)


def _fault(what: str, error: OSError) -> KernelFault:
    code = error.errno or 0
    return KernelFault(f"{what}: {_reason(code, '')}", code)


def _events_fault(error: OSError) -> KernelFault:
    if error.errno == errno.ENOBUFS:
        return EventsLost("the kernel reported events faster than we read them", errno.ENOBUFS)
    return _fault("reading netlink events", error)


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
        offset = 4 + ((length + 3) & ~3)
    for type_, payload in attributes(body, offset):
        if type_ == _NLMSGERR_ATTR_MSG:
            return payload.rstrip(b"\0").decode(errors="replace")
    return ""
