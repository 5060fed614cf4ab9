"""The server's end: takes, sends and echoes messages, and reports as whom it sees each flow.

Events on stdout: `listening`; `seen` (flow, address, time_ns) whenever a flow comes from another
address and port (for ICMP: identifier) than before; `broken` (flow, reason) where content or order
of what came in is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import socket
import sys
import time
from typing import Any, cast

from apagent.lab.plan import SECOND_SERVER_ADDRESS, SERVER_ADDRESS
from apagent.lab.traffic.jsonl import emit
from tests.chaos.programs import EVERY_S, TCP_PORT, UDP_PORT, tcp
from tests.chaos.programs.icmp import Echo, read_echo
from tests.chaos.programs.messages import DATA, DOWN, END, SEEN, SIZE, Broken, Message, expect
from tests.chaos.programs.messages import unpack as read

_seen: dict[int, str] = {}


def _note(flow: int, address: str, port: int) -> None:
    source = f"{address}:{port}"
    if _seen.get(flow) != source:
        _seen[flow] = source
        emit("seen", flow=flow, address=source, time_ns=time.monotonic_ns())


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    tcp.prepare(writer.get_extra_info("socket"))
    flow = -1
    try:
        hello = read(await reader.readexactly(SIZE))
        flow = hello.flow
        _note(flow, *writer.get_extra_info("peername")[:2])
        talk = _send if hello.tag == DOWN else _take
        await talk(flow, reader, writer)
        # Who closes first, in the middle of a break, may lose its last words: a kernel gives a
        # closed socket up at its next attempt if its timeout has grown to what `tcp.prepare` allows
        # (tcp_orphan_retries()).
        await reader.read()
    except Broken as broken:
        emit("broken", flow=flow, reason=f"at the server: {broken}")
    except (OSError, asyncio.IncompleteReadError):
        # The client has its own word on why its connection has ended.
        pass
    except asyncio.CancelledError:
        # At the very end; asyncio of Python 3.11 would complain about it.
        pass
    writer.transport.abort() if flow < 0 else writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def _take(flow: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Take messages, acknowledge each, and the end of all."""
    number = 0
    while True:
        data = await reader.readexactly(SIZE)
        if read(data).tag == END:
            break
        expect(data, Message(DATA, flow, number))
        number += 1
        writer.write(Message(SEEN, flow, number).pack())
    expect(data, Message(END, flow, number))
    writer.write(data)
    await writer.drain()


async def _send(flow: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send messages until the client has had enough, then say how many there were."""
    number, asked = 0, asyncio.ensure_future(reader.readexactly(SIZE))
    try:
        while not asked.done():
            writer.write(Message(DATA, flow, number).pack())
            number += 1
            await asyncio.wait([asked], timeout=EVERY_S)
        expect(await asked, Message(END, flow, 0))
    finally:
        asked.cancel()
    writer.write(Message(END, flow, number).pack())
    await writer.drain()


class _Datagrams(asyncio.DatagramProtocol):
    """Echoes what is right."""

    def __init__(self) -> None:
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # asyncio promises a datagram transport here, but its own is not a subclass of that.
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str | Any, int]) -> None:
        try:
            message = read(data)
        except Broken as broken:
            emit("broken", flow=-1, reason=f"at the server: {broken}")
            return
        _note(message.flow, *addr)
        if self._transport is not None:
            self._transport.sendto(data, addr)


def _watch_echoes() -> socket.socket:
    """See the echo requests that the kernel answers."""
    raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    raw.setblocking(False)

    def look() -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                packet, (address, _) = raw.recvfrom(256)
                found = read_echo(packet, Echo.REQUEST)
                if found is not None:
                    _note(found.message.flow, address, found.identifier)

    asyncio.get_running_loop().add_reader(raw, look)
    return raw


async def _run(for_s: float) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    any_address = "0.0.0.0"  # noqa: S104 - in a namespace
    server = await asyncio.start_server(_serve, any_address, TCP_PORT, backlog=1000)
    # One for each address, or the answers would come from the first one.
    datagrams = [
        (await loop.create_datagram_endpoint(_Datagrams, local_addr=(str(address), UDP_PORT)))[0]
        for address in (SERVER_ADDRESS, SECOND_SERVER_ADDRESS)
    ]
    raw = _watch_echoes()
    emit("listening")
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(for_s):
            await ended.wait()
    loop.remove_reader(raw)
    raw.close()
    for transport in datagrams:
        transport.close()
    server.close()


def main() -> int:
    """Run the program."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--for-s", type=float, default=300.0, help="end after this time")
    asyncio.run(_run(made.parse_args().for_s))
    return 0


if __name__ == "__main__":
    sys.exit(main())
