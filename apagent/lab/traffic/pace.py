"""A rate limit that sends in small steps and never catches up after a pause.

A sender that made up for a pause would hide it in a burst: the picture of a roam should show what
the path did, not what the sender saved up.
"""

from __future__ import annotations

from apagent.lab.traffic.content import BLOCK

STEP_S = 0.002
"""Time between two steps; below it, sleeping is no longer exact."""
_SAVED_STEPS = 5
_SMALLEST_PIECE = 256


class Pace:
    """A token bucket over `rate_mbit` (Mbit/s); 0: no limit."""

    def __init__(self, rate_mbit: float) -> None:
        self._bytes_per_s = rate_mbit * 1e6 / 8
        self._paid_until = 0.0

    @property
    def piece(self) -> int:
        """How many bytes to send in one step."""
        if not self._bytes_per_s:
            return BLOCK
        return min(BLOCK, max(_SMALLEST_PIECE, int(self._bytes_per_s * STEP_S)))

    def delay(self, size: int, now: float) -> float:
        """Seconds to wait after `size` bytes were sent at the time `now` (seconds)."""
        if not self._bytes_per_s:
            return 0.0
        earliest = now - _SAVED_STEPS * STEP_S
        self._paid_until = max(self._paid_until, earliest) + size / self._bytes_per_s
        return max(0.0, self._paid_until - now)
