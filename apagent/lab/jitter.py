"""What the receiver of a voice call says about it: loss, silence, jitter. Pure arithmetic."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from apagent.lab.traffic.rtp import CLOCK_HZ

_GAIN = 16
"""RFC 3550, 6.4.1: each difference counts a sixteenth."""
DURING_NS = 200_000_000
"""For so long after link up a roam is under way, as far as jitter is concerned: ten packets."""


class Around(NamedTuple):
    """Jitter (ms) just before a roam, at its worst while it is under way, and before the next."""

    before: float
    during: float
    after: float


@dataclass(frozen=True, slots=True)
class Reception:
    """Every packet that was received, in that order: when, its number, its timestamp (samples)."""

    received_ns: Sequence[int]
    sequences: Sequence[int]
    timestamps: Sequence[int]

    @classmethod
    def of(cls, events: Iterable[dict[str, Any]]) -> Reception:
        """Read the `packets` among a program's events; empty if there are none."""
        for event in events:
            if event["event"] == "packets":
                received = [event["start_ns"] + after * 1000 for after in event["received_us"]]
                return cls(received, event["sequences"], event["timestamps"])
        return cls([], [], [])

    @property
    def expected(self) -> int:
        """How many packets there are up to the latest (RFC 3550, A.3)."""
        return max(self.sequences) - min(self.sequences) + 1 if self.sequences else 0

    @property
    def lost(self) -> int:
        """How many of the expected packets never came."""
        return self.expected - len(set(self.sequences))

    @property
    def doubled(self) -> int:
        """How many packets came more than once."""
        return len(self.sequences) - len(set(self.sequences))

    def jitter_ms(self) -> list[float]:
        """Interarrival jitter after each packet (RFC 3550, 6.4.1)."""
        sent_ms = [timestamp * 1e3 / CLOCK_HZ for timestamp in self.timestamps]
        transits = [got / 1e6 - sent for got, sent in zip(self.received_ns, sent_ms, strict=True)]
        jitters = [0.0] if transits else []
        for before, after in pairwise(transits):
            jitters.append(jitters[-1] + (abs(after - before) - jitters[-1]) / _GAIN)
        return jitters

    def jitter_around(self, roams_ns: Sequence[int]) -> list[Around]:
        """Jitter around each of these moments; the last roam's `after` is the call's end.

        Empty if nothing was received.
        """
        jitters = self.jitter_ms()
        if not jitters:
            return []
        found = []
        for linked, following in pairwise((*roams_ns, self.received_ns[-1] + 1)):
            first = bisect_left(self.received_ns, linked)
            behind = bisect_right(self.received_ns, linked + DURING_NS)
            last = bisect_left(self.received_ns, following)
            found.append(
                Around(
                    before=jitters[max(0, first - 1)],
                    during=max(jitters[max(0, first - 1) : behind], default=0.0),
                    after=jitters[max(0, last - 1)],
                )
            )
        return found

    def longest_silence_ms(self) -> float:
        """The longest time between two packets."""
        gaps = (after - before for before, after in pairwise(self.received_ns))
        return max(gaps, default=0) / 1e6
