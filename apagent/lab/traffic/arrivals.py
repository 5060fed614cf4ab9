"""A log of every receipt: when, and how many bytes."""

from __future__ import annotations

from apagent.lab.traffic.jsonl import emit

FLUSH_NS = 250_000_000
"""How long receipts wait at most, while more come in, before they are written."""


class ArrivalLog:
    """Writes events `arrivals`: `start_ns`, and two lists, `after_us` (since then) and `bytes`."""

    def __init__(self) -> None:
        self._start_ns = 0
        self._after_us: list[int] = []
        self._bytes: list[int] = []
        self.total = 0

    def add(self, size: int, now_ns: int) -> None:
        """Note that `size` bytes were received at `now_ns`."""
        if not self._bytes:
            self._start_ns = now_ns
        self._after_us.append((now_ns - self._start_ns) // 1000)
        self._bytes.append(size)
        self.total += size
        if now_ns - self._start_ns >= FLUSH_NS:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting."""
        if self._bytes:
            emit("arrivals", start_ns=self._start_ns, after_us=self._after_us, bytes=self._bytes)
        self._after_us, self._bytes = [], []
