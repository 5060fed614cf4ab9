"""How often new and ended flows are read, so that many of them make one batch.

What a batch costs beside its flows (a message to each peer, a turn of the event loop, a transaction
in each peer's kernel) is some half a millisecond over all. If every flow were told by itself, a few
thousand a second would keep both ends busy with nothing else. So after a reading there is a pause:
long enough for about `WANTED` flows to come at the present rate, and never so long that a session
would be late for its client's roam, which takes longer in any case. The first flow after a silence
is told at once.
"""

from __future__ import annotations

from asyncio import AbstractEventLoop, TimerHandle
from collections.abc import Callable

WANTED = 50
"""Flows in a batch, as many as let the flows themselves be most of its cost."""
SHORTEST_S, LONGEST_S = 0.004, 0.010


def pause_s(flows: int, elapsed_s: float) -> float:
    """How long to wait after a reading that gave `flows`, `elapsed_s` after the one before."""
    return min(LONGEST_S, max(SHORTEST_S, elapsed_s * WANTED / flows))


class PacedReader:
    """Calls `read` when a descriptor is readable, with pauses in between.

    `read` says how many flows it has got. It must not raise.
    """

    def __init__(self, loop: AbstractEventLoop, descriptor: int, read: Callable[[], int]) -> None:
        self._loop = loop
        self._descriptor = descriptor
        self._read = read
        self._last = 0.0
        self._timer: TimerHandle | None = None
        self._wait()

    def close(self) -> None:
        """Read no more."""
        self._loop.remove_reader(self._descriptor)
        if self._timer is not None:
            self._timer.cancel()

    def _wait(self) -> None:
        """Nothing has come for a whole pause: be told when something does."""
        self._timer = None
        self._loop.add_reader(self._descriptor, self._begin)

    def _begin(self) -> None:
        self._loop.remove_reader(self._descriptor)
        self._last = self._loop.time() - LONGEST_S
        self._turn()

    def _turn(self) -> None:
        flows, now = self._read(), self._loop.time()
        if not flows:
            self._wait()
            return
        pause, self._last = pause_s(flows, now - self._last), now
        self._timer = self._loop.call_later(pause, self._turn)
