"""The arithmetic of the demo's timestamps."""

from __future__ import annotations

from typing import Any

import pytest

from apagent.lab.measure import Arrivals, Echoes

MS = 1_000_000


def arrivals(*times_ms: float, size: int = 1000) -> Arrivals:
    return Arrivals(tuple(int(t * MS) for t in times_ms), (size,) * len(times_ms))


def test_arrivals_are_collected_from_events_in_order() -> None:
    events: list[dict[str, Any]] = [
        {"event": "connected"},
        {"event": "arrivals", "start_ns": 5 * MS, "after_us": [0, 2000], "bytes": [10, 20]},
        {"event": "arrivals", "start_ns": 9 * MS, "after_us": [0], "bytes": [30]},
    ]
    assert Arrivals.of(events) == Arrivals((5 * MS, 7 * MS, 9 * MS), (10, 20, 30))


@pytest.mark.parametrize(
    ("times_ms", "interruption_ms"),
    [
        pytest.param((98, 103, 105, 112), 3, id="the first byte after link up"),
        pytest.param((98, 101, 103, 250, 252), 150, id="late reads from the old AP don't count"),
        pytest.param((98, 101, 103, 115, 117), 1, id="a short pause is no interruption"),
        pytest.param((98, 99), None, id="nothing ever came"),
        pytest.param((98, 101, 104), None, id="only late reads came"),
        pytest.param((98, 300, 302), 200, id="one long silence"),
    ],
)
def test_interruption(times_ms: tuple[float, ...], interruption_ms: float | None) -> None:
    expected = None if interruption_ms is None else interruption_ms * MS
    assert arrivals(*times_ms).interruption_ns(100 * MS) == expected


@pytest.mark.parametrize(
    ("times_ms", "silence_ms"),
    [
        pytest.param((95, 105, 107, 120, 300), 180, id="one that ends after the period"),
        pytest.param((50, 105, 110, 199, 200), 89, id="one inside, and one that began before"),
        pytest.param((95, 105), 95, id="one that nothing ends"),
        pytest.param((), 100, id="no byte at all"),
    ],
)
def test_longest_silence(times_ms: tuple[float, ...], silence_ms: float) -> None:
    assert arrivals(*times_ms).longest_silence_ns(100 * MS, 200 * MS) == silence_ms * MS


def test_rates_fill_whole_bins_and_leave_gaps_empty() -> None:
    rates = arrivals(0, 50, 250, 310, 999, size=12_500).rates_mbit(0, 320 * MS, 100 * MS)
    assert rates == [2.0, 0.0, 1.0]


def test_echoes_are_read_from_events() -> None:
    event = {"event": "echoes", "start_ns": MS, "sent_us": [0, 1000], "received_us": [500, None]}
    assert Echoes.of([event]) == Echoes([MS, 2 * MS], [MS + 500_000, None])
    assert Echoes.of([]) == Echoes([], [])


def test_echo_losses_and_interruption() -> None:
    sent = [n * MS for n in range(10)]
    received = [None if n in (4, 5) else n * MS + 500_000 for n in range(10)]
    echoes = Echoes(sent, received)
    assert echoes.lost(3 * MS, 9 * MS) == 2
    assert echoes.lost(6 * MS, 9 * MS) == 0
    assert echoes.interruption_ns(int(3.5 * MS)) == 3 * MS
    assert Echoes(sent, [None] * 10).interruption_ns(0) is None
