"""What the timestamps of the traffic programs say about each roam: pure arithmetic.

All times are CLOCK_MONOTONIC in nanoseconds, which the namespaces of a machine share.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

LATE_READ_NS = 10_000_000
"""For so long after link up the receiver may still be reading what came by way of the old AP."""
PAUSE_NS = 20_000_000
"""A silence that is longer than this, after such a late read, is part of the interruption."""

Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Every receipt of a transfer, in order: when, and how many bytes."""

    times_ns: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, events: Iterable[Event]) -> Arrivals:
        """Collect the `arrivals` among a program's events."""
        times: list[int] = []
        sizes: list[int] = []
        for event in events:
            if event["event"] == "arrivals":
                times += [event["start_ns"] + after * 1000 for after in event["after_us"]]
                sizes += event["bytes"]
        return cls(tuple(times), tuple(sizes))

    def interruption_ns(self, link_up_ns: int) -> int | None:
        """From link up to the first byte that came by way of the new AP; None: none ever came."""
        first = bisect_right(self.times_ns, link_up_ns)
        behind_late = bisect_right(self.times_ns, link_up_ns + LATE_READ_NS)
        if behind_late == len(self.times_ns):
            return None
        for before, after in pairwise(self.times_ns[first : behind_late + 1]):
            if after - before > PAUSE_NS:
                return after - link_up_ns
        return self.times_ns[first] - link_up_ns

    def longest_silence_ns(self, from_ns: int, to_ns: int) -> int:
        """The longest time without a byte that began or ended in a period.

        A silence that nothing ends is counted up to the end of the period.
        """
        first = max(0, bisect_left(self.times_ns, from_ns) - 1)
        behind = bisect_right(self.times_ns, to_ns) + 1
        times = self.times_ns[first:behind]
        if behind > len(self.times_ns):
            times = (*times, to_ns)
        return max((after - before for before, after in pairwise(times)), default=to_ns - from_ns)

    def rates_mbit(self, start_ns: int, end_ns: int, bin_ns: int) -> list[float]:
        """Mean rate (Mbit/s) in each whole bin of the period."""
        bins = [0] * max(0, (end_ns - start_ns) // bin_ns)
        for time_ns, size in zip(self.times_ns, self.sizes, strict=True):
            if start_ns <= time_ns < start_ns + len(bins) * bin_ns:
                bins[(time_ns - start_ns) // bin_ns] += size
        return [size * 8 * 1000 / bin_ns for size in bins]


@dataclass(frozen=True, slots=True)
class Echoes:
    """Every request of an echo program, in order: when it was sent and answered (None: never)."""

    sent_ns: Sequence[int]
    received_ns: Sequence[int | None]

    @classmethod
    def of(cls, events: Iterable[Event]) -> Echoes:
        """Read the `echoes` among a program's events; empty if there are none."""
        for event in events:
            if event["event"] == "echoes":
                start = event["start_ns"]
                return cls(
                    [start + sent * 1000 for sent in event["sent_us"]],
                    [None if got is None else start + got * 1000 for got in event["received_us"]],
                )
        return cls([], [])

    def lost(self, from_ns: int, to_ns: int) -> int:
        """How many requests that were sent in this period stayed without an answer."""
        first, behind = bisect_left(self.sent_ns, from_ns), bisect_left(self.sent_ns, to_ns)
        return sum(answered is None for answered in self.received_ns[first:behind])

    def interruption_ns(self, link_up_ns: int) -> int | None:
        """From link up to the first answer to a request that was sent after it; None: none came."""
        first = bisect_left(self.sent_ns, link_up_ns)
        for answered in self.received_ns[first:]:
            if answered is not None:
                return answered - link_up_ns
        return None
