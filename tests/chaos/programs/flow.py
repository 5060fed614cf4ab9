"""What all flows of a client have in common: their record."""

from __future__ import annotations

import asyncio
import time
from typing import Any

NOTED_S = 0.4
"""Shorter silence isn't worth a note."""


class Flow:
    """A flow and its record; `run` opens it, talks until `closing`, and ends it in an orderly way.

    Whoever runs it calls `progress` when something has come back, and `lose` when it is over.
    """

    def __init__(self, number: int, client: str, namespace: str) -> None:
        self.number = number
        self.namespace = namespace
        self.closing = asyncio.Event()
        self._client = client
        self._asked_ns = time.monotonic_ns()
        self._opened_ns = 0
        self._last_ns = 0
        self._gaps: list[tuple[int, int]] = []
        self._received = 0
        self._lost = ""
        self._lost_ns = 0
        self._port = 0

    async def run(self) -> None:
        """The whole life."""
        raise NotImplementedError

    @property
    def is_open(self) -> bool:
        """Whether anything has come back yet."""
        return bool(self._opened_ns)

    def bound(self, port: int) -> None:
        """The client's own port, or the identifier of its echoes."""
        self._port = port

    def progress(self) -> None:
        """Something has come back, and it was right."""
        now = time.monotonic_ns()
        self._opened_ns = self._opened_ns or now
        if self._last_ns and now - self._last_ns > NOTED_S * 1e9:
            self._gaps.append((self._last_ns, now))
        self._last_ns = now
        self._received += 1

    def lose(self, reason: str) -> None:
        """It is over, and shouldn't be. Only the first reason counts."""
        if not self._lost:
            self._lost, self._lost_ns = reason, time.monotonic_ns()

    def record(self) -> dict[str, Any]:
        """Of `tests.chaos.record.Record`, all that this end knows."""
        return {
            "flow": self.number,
            "client": self._client,
            "port": self._port,
            "asked_ns": self._asked_ns,
            "opened_ns": self._opened_ns,
            "last_ns": self._last_ns,
            "ended_ns": time.monotonic_ns(),
            "received": self._received,
            "gaps_ns": self._gaps,
            "lost": self._lost,
            "lost_ns": self._lost_ns,
        }
