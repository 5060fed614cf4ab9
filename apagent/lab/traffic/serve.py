"""The other end of the traffic programs: files down and up, line echo (all TCP), and UDP echo.

Every service reports the peer address and port that it sees. Ends after its time, or on SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, cast

from apagent.lab.traffic import PORTS
from apagent.lab.traffic.content import pieces
from apagent.lab.traffic.datagram import answer
from apagent.lab.traffic.jsonl import emit
from apagent.lab.traffic.pace import Pace

_RECEIVE = 1 << 16
_REQUEST_TIMEOUT_S = 10.0
_IDLE_TIMEOUT_S = 300.0

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def download(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send the file that the request names (seed, size, rate)."""
    request = await _request(reader)
    _answer(writer, **_peer(writer))
    pace = Pace(float(request["rate_mbit"]))
    for piece in pieces(int(request["seed"]), int(request["size"]), pace.piece):
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(pace.delay(len(piece), time.monotonic()))


async def upload(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Take a file of the size that the request names and answer with its checksum."""
    request = await _request(reader)
    _answer(writer, **_peer(writer))
    left, stall_s = int(request["size"]), float(request["stall_s"])
    digest, last, longest, behind = hashlib.sha256(), time.monotonic_ns(), 0, 0
    while left:
        async with asyncio.timeout(stall_s):
            data = await reader.read(min(left, _RECEIVE))
        if not data:
            break
        now = time.monotonic_ns()
        if now - last > longest:
            longest, behind = now - last, now
        last, left = now, left - len(data)
        digest.update(data)
    got = {
        "bytes": int(request["size"]) - left,
        "sha256": digest.hexdigest(),
        "longest_gap_ms": longest / 1e6,
        "longest_gap_end_ns": behind,
    }
    emit("upload", **_peer(writer), **got)
    _answer(writer, **_peer(writer), **got)


async def lines(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Greet with the peer's address, then echo every line."""
    _answer(writer, **_peer(writer))
    while True:
        async with asyncio.timeout(_IDLE_TIMEOUT_S):
            line = await reader.readline()
        if not line:
            return
        writer.write(line)
        await writer.drain()


SERVICES: dict[str, Handler] = {"download": download, "upload": upload, "lines": lines}


class EchoProtocol(asyncio.DatagramProtocol):
    """Answers each datagram with itself and the sender's address as seen here."""

    def __init__(self) -> None:
        self._transport: asyncio.DatagramTransport | None = None
        self._seen: set[tuple[str, int]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is open."""
        # asyncio promises a datagram transport here, but its own is not a subclass of that.
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str | Any, int]) -> None:
        """A datagram came in."""
        if addr not in self._seen:
            self._seen.add(addr)
            emit("peer", service="echo", address=addr[0], port=addr[1])
        if self._transport is not None:
            self._transport.sendto(answer(data, addr[0], addr[1]), addr)


def _peer(writer: asyncio.StreamWriter) -> dict[str, object]:
    address, port = writer.get_extra_info("peername")[:2]
    return {"address": address, "port": port}


def _answer(writer: asyncio.StreamWriter, **fields: object) -> None:
    writer.write(json.dumps(fields).encode() + b"\n")


async def _request(reader: asyncio.StreamReader) -> dict[str, Any]:
    async with asyncio.timeout(_REQUEST_TIMEOUT_S):
        line = await reader.readline()
    request = json.loads(line)
    if not isinstance(request, dict):
        raise TypeError("the request is not a JSON object")
    return request


def _reporting(service: str, handle: Handler) -> Handler:
    """`handle`, with a report of who came, and of how it ended."""

    async def reporting(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = {"service": service, **_peer(writer)}
        emit("peer", **peer)
        reason = ""
        try:
            await handle(reader, writer)
            await writer.drain()
        except (OSError, TimeoutError, ValueError, TypeError, KeyError) as error:
            reason = f"{type(error).__name__}: {error}"
        except asyncio.CancelledError:
            # The task is at its end anyhow; asyncio of Python 3.11 would complain about it.
            reason = "the server ended"
        if reason:
            writer.transport.abort()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        emit("closed", reason=reason, **peer)

    return reporting


async def serve(address: str, ports: Mapping[str, int], for_s: float) -> None:
    """Serve on `ports` (by service; 0: any) for `for_s` seconds or until SIGTERM."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    servers = {
        name: await asyncio.start_server(_reporting(name, handle), address, ports[name])
        for name, handle in SERVICES.items()
    }
    echo, _ = await loop.create_datagram_endpoint(EchoProtocol, local_addr=(address, ports["echo"]))
    bound = {name: server.sockets[0].getsockname()[1] for name, server in servers.items()}
    bound["echo"] = echo.get_extra_info("sockname")[1]
    emit("listening", address=address, ports=bound)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(for_s):
            await ended.wait()
    echo.close()
    for server in servers.values():
        server.close()


def main(argv: list[str] | None = None) -> int:
    """Run the program."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--address", default="0.0.0.0", help="address to listen on")  # noqa: S104 - in a namespace
    made.add_argument("--any-port", action="store_true", help="instead of the usual ports")
    made.add_argument("--for-s", type=float, default=300.0, help="end after this time")
    options = made.parse_args(argv)
    ports = dict.fromkeys(PORTS, 0) if options.any_port else PORTS
    asyncio.run(serve(options.address, ports, options.for_s))
    return 0


if __name__ == "__main__":
    sys.exit(main())
