"""Sets of moments."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from tests.chaos.spans import Spans, spans, union

MOMENTS = st.integers(0, 20).map(float)
SPANS = st.lists(st.tuples(MOMENTS, MOMENTS), max_size=5).map(spans)
HALVES = [n + 0.5 for n in range(-1, 21)]


def moments(made: Spans) -> list[float]:
    return [at for at in HALVES if made.at(at)]


@given(SPANS, SPANS)
def test_they_behave_like_sets(one: Spans, two: Spans) -> None:
    assert moments(union([one, two])) == moments(one | two)
    assert moments(one | two) == [at for at in HALVES if one.at(at) or two.at(at)]
    assert moments(one & two) == [at for at in HALVES if one.at(at) and two.at(at)]
    assert moments(one - two) == [at for at in HALVES if one.at(at) and not two.at(at)]
    assert moments(~one) == [at for at in HALVES if not one.at(at)]


def test_lengths() -> None:
    made = spans([(0, 2), (2, 3), (5, 6), (9, 8)])
    assert list(made) == [(0, 3), (5, 6)]
    assert made.longest() == 3
    assert list(made.lasting(2)) == [(0, 3)]
    assert list(made.grown(1, 1)) == [(-1, 7)]
    assert list(made.grown(-1)) == [(1, 3)]
    assert list(made.within(2, math.inf)) == [(2, 3), (5, 6)]
    assert not Spans()
