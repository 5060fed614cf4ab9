"""Both ends of a WebSocket: numbered messages both ways, and pings with a deadline.

`websocket serve` waits for one client; `websocket talk` is that client. SIGTERM to the client ends
the conversation in an orderly way: each end says how many messages it has sent.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import random
import signal
import sys
import time

from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.connection import Connection
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from apagent.lab.traffic.jsonl import emit

INTERVAL_S = 0.02
PING_S = 0.1
PING_TIMEOUT_S = 3.0
_LARGEST = 4000


def message(number: int) -> bytes:
    """The message of that number: the same at both ends, of a size of its own."""
    generator = random.Random(number)
    return f"{number} ".encode() + generator.randbytes(generator.randrange(_LARGEST))


class Conversation:
    """One end of the conversation."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.sent = 0
        self.received = 0
        self.wrong = 0
        self.peer_sent: int | None = None
        self.longest_gap_s = 0.0

    async def speak(self, ended: asyncio.Event) -> None:
        """Send messages until `ended`, then how many there were."""
        while not ended.is_set():
            await self._connection.send(message(self.sent))
            self.sent += 1
            await asyncio.sleep(INTERVAL_S)
        await self._connection.send(f"sent {self.sent}")

    async def listen(self) -> None:
        """Receive and check until the other end has said how many it has sent."""
        last = time.monotonic()
        async for data in self._connection:
            now = time.monotonic()
            self.longest_gap_s, last = max(self.longest_gap_s, now - last), now
            if isinstance(data, str):
                self.peer_sent = int(data.removeprefix("sent "))
                return
            self.wrong += data != message(self.received)
            self.received += 1

    def report(self, **more: object) -> None:
        """Write the result."""
        emit(
            "result",
            sent=self.sent,
            received=self.received,
            wrong=self.wrong,
            peer_sent=self.peer_sent,
            longest_gap_ms=round(self.longest_gap_s * 1e3, 1),
            **more,
        )


async def _serve(options: argparse.Namespace, ended: asyncio.Event) -> None:
    over = asyncio.Event()

    async def answer(connection: ServerConnection) -> None:
        emit("connected", client=connection.remote_address[0])
        talk, client_ended = Conversation(connection), asyncio.Event()
        speaking = asyncio.create_task(talk.speak(client_ended), name="speak")
        await talk.listen()
        client_ended.set()
        with contextlib.suppress(ConnectionClosed):
            await speaking
        await connection.wait_closed()
        talk.report(close_code=connection.close_code)
        over.set()

    async with serve(answer, options.host, options.port, ping_timeout=PING_TIMEOUT_S):
        emit("listening")
        waits = [asyncio.create_task(event.wait()) for event in (over, ended)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)


async def _talk(options: argparse.Namespace, ended: asyncio.Event) -> None:
    url = f"ws://{options.host}:{options.port}"
    async with connect(url, proxy=None, ping_interval=None) as connection:
        talk, pings = Conversation(connection), list[float]()
        emit("connected")
        pinging = asyncio.create_task(_ping(connection, pings), name="ping")
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(talk.speak(ended), name="speak")
                group.create_task(talk.listen(), name="listen")
        finally:
            if not pinging.done():
                pinging.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await pinging
    talk.report(
        close_code=connection.close_code,
        pings=len(pings),
        longest_ping_ms=round(max(pings, default=0.0) * 1e3, 1),
    )


async def _ping(connection: ClientConnection, latencies_s: list[float]) -> None:
    for _ in itertools.count():
        async with asyncio.timeout(PING_TIMEOUT_S):
            latencies_s.append(await (await connection.ping()))
        await asyncio.sleep(PING_S)


async def _run(options: argparse.Namespace) -> None:
    ended, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    loop.call_later(options.for_s, ended.set)
    await (_serve if options.role == "serve" else _talk)(options, ended)


def main(argv: list[str] | None = None) -> int:
    """Run the program."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("role", choices=("serve", "talk"))
    made.add_argument("host")
    made.add_argument("--port", type=int, required=True)
    made.add_argument("--for-s", type=float, default=300.0, help="end after this time")
    options = made.parse_args(argv)
    asyncio.run(_run(options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
