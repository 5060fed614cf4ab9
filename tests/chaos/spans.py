"""Sets of moments: when something was so. Seconds since the start of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

Span = tuple[float, float]
"""From when to when."""


@dataclass(frozen=True, slots=True)
class Spans:
    """Disjoint spans in order; made with `spans`."""

    all: tuple[Span, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.all)

    def __iter__(self) -> Iterator[Span]:
        return iter(self.all)

    def __or__(self, other: Spans) -> Spans:
        return spans((*self.all, *other.all))

    def __and__(self, other: Spans) -> Spans:
        return ~(~self | ~other)

    def __invert__(self) -> Spans:
        edges = [-math.inf, *(edge for span in self.all for edge in span), math.inf]
        return spans(zip(edges[::2], edges[1::2], strict=True))

    def __sub__(self, other: Spans) -> Spans:
        return self & ~other

    def grown(self, before: float = 0.0, after: float = 0.0) -> Spans:
        """Each span from earlier and until later; negative: it shrinks, perhaps to nothing."""
        return spans((begin - before, end + after) for begin, end in self.all)

    def lasting(self, least: float) -> Spans:
        """Those that last so long."""
        return Spans(tuple(span for span in self.all if span[1] - span[0] >= least))

    def within(self, begin: float, end: float) -> Spans:
        """What of them is in this span."""
        return self & spans([(begin, end)])

    def longest(self) -> float:
        """How long the longest one is."""
        return max((end - begin for begin, end in self.all), default=0.0)

    def at(self, moment: float) -> bool:
        """Whether it was so then."""
        return any(begin <= moment <= end for begin, end in self.all)


def spans(made: Iterable[Span]) -> Spans:
    """Any spans, merged where they touch; empty ones are left out."""
    merged: list[Span] = []
    for begin, end in sorted(span for span in made if span[0] < span[1]):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((begin, end))
    return Spans(tuple(merged))


def union(sets: Iterable[Spans]) -> Spans:
    """When any of them was so."""
    return spans(span for each in sets for span in each)
