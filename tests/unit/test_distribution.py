"""Percentiles and the picture of distributions."""

from __future__ import annotations

import re

import pytest

from tests.bench.distribution import cumulative_chart, percentile


@pytest.mark.parametrize(
    ("percent", "expected"), [(0, 1), (1, 2), (50, 100), (99, 198), (99.5, 199), (100, 200)]
)
def test_a_percentile_is_one_of_the_values(percent: float, expected: float) -> None:
    assert percentile(range(200, 0, -1), percent) == expected


def test_the_picture_names_every_curve() -> None:
    text = cumulative_chart("Gaps", {"1 flow": [1.0, 2.0], "many <flows>": [3.0, 900.0]}, 5.0)
    words = set(re.findall(r"<text [^>]*>([^<]*)</text>", text))
    assert {"Gaps", "1 flow", "many &lt;flows&gt;", "budget"} <= words
