"""The kinds of flows, as their clients see them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable

from apagent.lab import namespaces
from apagent.lab.plan import SECOND_SERVER_ADDRESS, SERVER_ADDRESS
from tests.chaos.programs import EVERY_S, TCP_PORT, UDP_PORT, tcp
from tests.chaos.programs.flow import Flow
from tests.chaos.programs.icmp import Echo, echo_request, read_echo
from tests.chaos.programs.messages import (
    DATA,
    DOWN,
    END,
    SEEN,
    SIZE,
    UP,
    Broken,
    Message,
    expect,
)
from tests.chaos.programs.messages import unpack as read
from tests.chaos.schedule import Kind


class _Connection(Flow):
    """A TCP connection: lost when it is reset, ends early, or brings what was not sent."""

    hello: bytes

    async def run(self) -> None:
        try:
            await self._talk(*await self._connect())
        except (OSError, asyncio.IncompleteReadError, Broken) as error:
            self.lose(f"{type(error).__name__}: {error}")

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        made = _socket(self.namespace, socket.SOCK_STREAM)
        tcp.prepare(made)
        try:
            await asyncio.get_running_loop().sock_connect(made, (_server(self.number), TCP_PORT))
        except BaseException:
            made.close()
            raise
        self.bound(made.getsockname()[1])
        self.progress()
        return await asyncio.open_connection(sock=made)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(Message(self.hello, self.number, 0).pack())
        try:
            await self._exchange(reader, writer)
        finally:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise NotImplementedError


class Up(_Connection):
    """The client sends, and every message is acknowledged."""

    hello = UP

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sending = asyncio.create_task(self._send(writer), name=f"sender of {self.number}")
        try:
            number = 0
            while read(data := await reader.readexactly(SIZE)).tag == SEEN:
                number += 1
                expect(data, Message(SEEN, self.number, number))
                self.progress()
            expect(data, Message(END, self.number, number))
            self.progress()
        finally:
            sending.cancel()

    async def _send(self, writer: asyncio.StreamWriter) -> None:
        number = 0
        while not self.closing.is_set():
            writer.write(Message(DATA, self.number, number).pack())
            number += 1
            await _either(self.closing.wait(), EVERY_S)
        writer.write(Message(END, self.number, number).pack())


class Down(_Connection):
    """The client says once what it wants, and listens."""

    hello = DOWN

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ending = asyncio.create_task(self._end(writer), name=f"end of {self.number}")
        try:
            number = 0
            while read(data := await reader.readexactly(SIZE)).tag == DATA:
                expect(data, Message(DATA, self.number, number))
                number += 1
                self.progress()
            expect(data, Message(END, self.number, number))
            self.progress()
        finally:
            ending.cancel()

    async def _end(self, writer: asyncio.StreamWriter) -> None:
        await self.closing.wait()
        writer.write(Message(END, self.number, 0).pack())


class _Echoes(Flow):
    """Messages that come back one by one. The last one must, too; some in between may be lost."""

    def __init__(self, number: int, client: str, namespace: str) -> None:
        super().__init__(number, client, namespace)
        self._number = 0

    async def run(self) -> None:
        made = self._open()
        answered = asyncio.Event()
        asyncio.get_running_loop().add_reader(made, self._take, made, answered)
        try:
            await self._send_until(made, self.closing)
            answered.clear()
            await self._send_until(made, answered)
        finally:
            asyncio.get_running_loop().remove_reader(made)
            made.close()

    async def _send_until(self, made: socket.socket, event: asyncio.Event) -> None:
        while not event.is_set():
            self._send(made)
            await _either(event.wait(), EVERY_S)

    def _open(self) -> socket.socket:
        raise NotImplementedError

    def _request(self, message: Message) -> bytes:
        raise NotImplementedError

    def _answer(self, data: bytes) -> Message | None:
        raise NotImplementedError

    def _send(self, made: socket.socket) -> None:
        # The link may be down, or an ICMP error may have come in: the message is lost.
        with contextlib.suppress(OSError):
            made.send(self._request(Message(DATA, self.number, self._number)))
        self._number += 1

    def _take(self, made: socket.socket, answered: asyncio.Event) -> None:
        with contextlib.suppress(OSError):
            message = self._answer(made.recv(256))
            if message is not None:
                self.progress()
                answered.set()


class Datagrams(_Echoes):
    """UDP, from one socket."""

    def _open(self) -> socket.socket:
        made = _socket(self.namespace, socket.SOCK_DGRAM)
        made.connect((_server(self.number), UDP_PORT))
        self.bound(made.getsockname()[1])
        return made

    def _request(self, message: Message) -> bytes:
        return message.pack()

    def _answer(self, data: bytes) -> Message | None:
        try:
            message = read(data)
        except Broken as broken:
            self.lose(f"Broken: {broken}")
            return None
        if message.flow != self.number:
            self.lose(f"Broken: an answer to flow {message.flow}")
        return message


class Pings(_Echoes):
    """ICMP, with an identifier of its own."""

    def _open(self) -> socket.socket:
        made = _socket(self.namespace, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        made.connect((_server(self.number), 0))
        self.bound(self._identifier)
        return made

    def _request(self, message: Message) -> bytes:
        return echo_request(self._identifier, message)

    def _answer(self, data: bytes) -> Message | None:
        found = read_echo(data, Echo.REPLY)
        if found is None or found.message.flow != self.number:
            return None
        if found.identifier != self._identifier:
            self.lose(f"Broken: an answer with identifier {found.identifier}")
        return found.message

    @property
    def _identifier(self) -> int:
        return self.number % 0xFFFF + 1


FLOWS: dict[Kind, Callable[[int, str, str], Flow]] = {
    Kind.UP: Up,
    Kind.DOWN: Down,
    Kind.UDP: Datagrams,
    Kind.PING: Pings,
}


async def _either(event: Awaitable[object], timeout_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event


def _server(number: int) -> str:
    return str((SERVER_ADDRESS, SECOND_SERVER_ADDRESS)[number % 2])


def _socket(namespace: str, *kind: int) -> socket.socket:
    with namespaces.inside(namespace):
        made = socket.socket(socket.AF_INET, *kind)
    made.setblocking(False)
    return made
