"""A web server over TLS, HTTP/1.1 and HTTP/2: an endless download, and uploads of any length.

SIGUSR1 brings running downloads to an orderly end; SIGTERM ends the server. Every request is
reported with who asked, the protocol, and the checksum of what was sent or received.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any, cast

from hypercorn.asyncio import serve
from hypercorn.config import Config
from hypercorn.typing import ASGIFramework

from apagent.lab.traffic.content import pieces
from apagent.lab.traffic.jsonl import emit
from apagent.lab.traffic.pace import Pace

_ENDLESS = 1 << 50
_ANSWER = {"type": "http.response.start", "status": 200, "headers": []}

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Application:
    """An ASGI application: GET sends pseudo-random content until `ended`, PUT takes anything."""

    def __init__(self, rate_mbit: float) -> None:
        self._rate_mbit = rate_mbit
        self.ended = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        asked = {"client": scope["client"][0], "version": scope["http_version"]}
        emit("request", method=scope["method"], **asked)
        serving = self._download(send) if scope["method"] == "GET" else _upload(receive, send)
        size, checksum = await serving
        emit("served", method=scope["method"], bytes=size, sha256=checksum, **asked)

    async def _download(self, send: Send) -> tuple[int, str]:
        pace, digest, size = Pace(self._rate_mbit), hashlib.sha256(), 0
        await send(_ANSWER)
        for piece in pieces(1, _ENDLESS, pace.piece):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            digest.update(piece)
            size += len(piece)
            if self.ended.is_set():
                break
            await asyncio.sleep(pace.delay(len(piece), time.monotonic()))
        await send({"type": "http.response.body"})
        return size, digest.hexdigest()


async def _upload(receive: Receive, send: Send) -> tuple[int, str]:
    digest, size, more = hashlib.sha256(), 0, True
    while more:
        event = await receive()
        if event["type"] != "http.request":
            break
        digest.update(event.get("body", b""))
        size += len(event.get("body", b""))
        more = event.get("more_body", False)
    await send(_ANSWER)
    await send({"type": "http.response.body", "body": digest.hexdigest().encode()})
    return size, digest.hexdigest()


async def _live(receive: Receive, send: Send) -> None:
    while True:
        event = (await receive())["type"]
        await send({"type": f"{event}.complete"})
        if event == "lifespan.shutdown":
            return


async def run(options: argparse.Namespace) -> None:
    """Serve until SIGTERM or the end of the time."""
    loop = asyncio.get_running_loop()
    application, ended = Application(options.rate_mbit), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    loop.add_signal_handler(signal.SIGUSR1, application.ended.set)
    loop.call_later(options.for_s, ended.set)
    config = Config()
    config.bind = [f"{options.address}:{options.port}"]
    config.certfile, config.keyfile = options.certificate, options.key
    config.errorlog = None
    config.graceful_timeout = 1.0
    # Hypercorn's types know ASGI's events one by one; to us they are dictionaries.
    await serve(cast(ASGIFramework, application), config, shutdown_trigger=ended.wait)


def main(argv: list[str] | None = None) -> int:
    """Run the program."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--address", required=True)
    made.add_argument("--port", type=int, required=True)
    made.add_argument("--certificate", required=True, help="PEM file")
    made.add_argument("--key", required=True, help="PEM file")
    made.add_argument("--rate-mbit", type=float, default=0.0, help="of downloads; 0: no limit")
    made.add_argument("--for-s", type=float, default=300.0, help="end after this time")
    asyncio.run(run(made.parse_args(argv)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
