"""What the TCP clients share: options, connecting, and talking to the server in JSON lines."""

from __future__ import annotations

import argparse
import json
import socket
import time
from typing import Any

MAX_LINE = 1 << 16


class GivenUp(Exception):
    """The exchange can't go on; the text says why."""


def parser(doc: str, port: int) -> argparse.ArgumentParser:
    """A parser with the options that every client has."""
    made = argparse.ArgumentParser(description=doc)
    made.add_argument("host", help="address of the server")
    made.add_argument("--port", type=int, default=port)
    made.add_argument("--stall-s", type=float, default=6.0, help="give up after this silence")
    made.add_argument("--deadline-s", type=float, default=300.0, help="give up after this time")
    return made


def add_content_options(made: argparse.ArgumentParser) -> None:
    """Options of the programs that move a file."""
    made.add_argument("--seed", type=int, default=1, help="of the pseudo-random content")
    made.add_argument("--size", type=int, default=1_000_000, help="bytes")
    made.add_argument("--rate-mbit", type=float, default=0.0, help="Mbit/s; 0: no limit")


class Exchange:
    """A TCP connection that gives up: after `stall_s` of silence, or `deadline_s` in all.

    Every method raises GivenUp when the connection fails, stalls or runs out of time.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._stall_s: float = options.stall_s
        self._ends = time.monotonic() + options.deadline_s
        self._rest = b""
        try:
            self.socket = socket.create_connection((options.host, options.port), self._stall_s)
        except OSError as error:
            raise GivenUp(f"no connection to {options.host}:{options.port}: {error}") from error
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Unacknowledged data counts as silence too (RFC 5482), else a sender stalls unnoticed.
        self.socket.setsockopt(
            socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, int(self._stall_s * 1000))
        )

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Send all of `data`."""
        self._limit()
        try:
            self.socket.sendall(data)
        except OSError as error:
            raise self._given_up(error) from error

    def send_json(self, **fields: object) -> None:
        """Send one JSON line."""
        self.send(json.dumps(fields).encode() + b"\n")

    def receive(self, size: int) -> bytes:
        """At most `size` bytes, at least one."""
        if self._rest:
            taken, self._rest = self._rest[:size], self._rest[size:]
            return taken
        self._limit()
        try:
            data = self.socket.recv(size)
        except OSError as error:
            raise self._given_up(error) from error
        if not data:
            raise GivenUp("the server closed the connection early")
        return data

    def receive_line(self) -> bytes:
        """One line, without its end."""
        data = b""
        while b"\n" not in data:
            if len(data) > MAX_LINE:
                raise GivenUp("the server sent no line end")
            data += self.receive(4096)
        line, _, self._rest = data.partition(b"\n")
        return line

    def receive_json(self) -> dict[str, Any]:
        """One JSON line."""
        line = self.receive_line()
        try:
            answer = json.loads(line)
        except ValueError as error:
            raise GivenUp(f"the server sent {line[:80]!r} instead of JSON") from error
        if not isinstance(answer, dict):
            raise GivenUp(f"the server sent {line[:80]!r} instead of a JSON object")
        return answer

    def _limit(self) -> None:
        left = self._ends - time.monotonic()
        if left <= 0:
            raise GivenUp("out of time")
        self.socket.settimeout(min(self._stall_s, left))

    def _given_up(self, error: OSError) -> GivenUp:
        if isinstance(error, TimeoutError):
            if time.monotonic() >= self._ends:
                return GivenUp("out of time")
            return GivenUp(f"stalled: no progress for {self._stall_s:g} s")
        return GivenUp(f"connection failed: {error.strerror or error}")
