"""Both ends of a QUIC connection: a stream that the server echoes, checked byte for byte.

`quic serve` and `quic talk`. SIGUSR1 makes the client migrate: it goes on from a new local port,
with a new connection id (RFC 9000, 9). SIGTERM ends its stream in an orderly way.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import signal
import socket
import sys
import time
from typing import Any

from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.asyncio.server import serve as quic_serve
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import ConnectionTerminated, QuicEvent

from apagent.lab.traffic.arrivals import ArrivalLog
from apagent.lab.traffic.content import pieces
from apagent.lab.traffic.jsonl import emit
from apagent.lab.traffic.pace import Pace

ALPN = "echo"
IDLE_TIMEOUT_S = 5.0
_ENDLESS = 1 << 50
_READ = 1 << 16
_LAST_ECHO_S = 10.0


class _Server(QuicConnectionProtocol):
    """Echoes every stream; reports each address that the client comes from."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        options["stream_handler"] = self._handle
        super().__init__(*arguments, **options)
        self._seen: set[object] = set()
        self._echoing: set[asyncio.Task[None]] = set()

    def datagram_received(self, data: bytes | str, addr: Any) -> None:
        if addr not in self._seen:
            self._seen.add(addr)
            emit("peer", address=addr[0], port=addr[1], time_ns=time.monotonic_ns())
        super().datagram_received(data, addr)

    def quic_event_received(self, event: QuicEvent) -> None:
        super().quic_event_received(event)
        if isinstance(event, ConnectionTerminated):
            emit("closed", code=event.error_code, reason=event.reason_phrase)

    def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(_echo(reader, writer), name="echo")
        self._echoing.add(task)
        task.add_done_callback(self._echoing.discard)


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_READ):
        writer.write(data)
    writer.write_eof()


class _Client(QuicConnectionProtocol):
    """A connection whose socket can be exchanged."""

    async def migrate(self) -> None:
        """Go on from a new local port, on a path that gives nothing away about the old one."""
        old = self._transport
        await _open(self)
        self.change_connection_id()
        if old is not None:
            old.close()


async def _open(client: _Client) -> None:
    """Give the client a new socket, and report its port."""
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: client,
        local_addr=("0.0.0.0", 0),  # noqa: S104 - in a namespace
        family=socket.AF_INET,
    )
    emit("bound", port=transport.get_extra_info("sockname")[1], time_ns=time.monotonic_ns())


async def _serve(options: argparse.Namespace, ended: asyncio.Event) -> None:
    configuration = QuicConfiguration(
        is_client=False, alpn_protocols=[ALPN], idle_timeout=IDLE_TIMEOUT_S
    )
    configuration.load_cert_chain(options.certificate, options.key)
    server = await quic_serve(
        options.host, options.port, configuration=configuration, create_protocol=_Server
    )
    emit("listening")
    await ended.wait()
    server.close()
    emit("result")


async def _talk(options: argparse.Namespace, ended: asyncio.Event) -> None:
    configuration = QuicConfiguration(
        alpn_protocols=[ALPN], server_name=options.host, idle_timeout=IDLE_TIMEOUT_S
    )
    configuration.load_verify_locations(options.certificate)
    client = _Client(QuicConnection(configuration=configuration))
    await _open(client)
    client.connect((options.host, options.port))
    await client.wait_connected()
    emit("connected")
    migrations = set[asyncio.Task[None]]()
    asyncio.get_running_loop().add_signal_handler(
        signal.SIGUSR1, lambda: migrations.add(asyncio.create_task(client.migrate()))
    )
    result = await _exchange(client, options.rate_mbit, ended)
    await asyncio.gather(*migrations)
    client.close()
    await client.wait_closed()
    emit("result", **result)


async def _exchange(
    client: QuicConnectionProtocol, rate_mbit: float, ended: asyncio.Event
) -> dict[str, object]:
    """Send until `ended`, and compare with what comes back."""
    reader, writer = await client.create_stream()
    log, digest = ArrivalLog(), hashlib.sha256()
    receiving = asyncio.create_task(_receive(reader, log, digest), name="receive")
    sent, expected, pace = 0, hashlib.sha256(), Pace(rate_mbit)
    for piece in pieces(3, _ENDLESS, pace.piece):
        if ended.is_set() or receiving.done():
            break
        writer.write(piece)
        expected.update(piece)
        sent += len(piece)
        await asyncio.sleep(pace.delay(len(piece), time.monotonic()))
    writer.write_eof()
    async with asyncio.timeout(_LAST_ECHO_S):
        await receiving
    log.flush()
    match = expected.digest() == digest.digest()
    return {"sent": sent, "received": log.total, "sha256_match": match}


async def _receive(reader: asyncio.StreamReader, log: ArrivalLog, digest: Any) -> None:
    while data := await reader.read(_READ):
        log.add(len(data), time.monotonic_ns())
        digest.update(data)


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
    made.add_argument("--certificate", required=True, help="PEM file of the server's certificate")
    made.add_argument("--key", help="PEM file")
    made.add_argument("--rate-mbit", type=float, default=2.0)
    made.add_argument("--for-s", type=float, default=300.0, help="end after this time")
    asyncio.run(_run(made.parse_args(argv)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
