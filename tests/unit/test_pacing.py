"""When new flows are read: at once after a silence, in batches under load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from apagent.pacing import LONGEST_S, SHORTEST_S, PacedReader, pause_s

FD = 7


class Timer:
    def __init__(self, at: float, call: Callable[[], None]) -> None:
        self.at, self.call, self.cancelled = at, call, False

    def cancel(self) -> None:
        self.cancelled = True


class Loop:
    """As much of an event loop as is needed, with a clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0
        self.reader: Callable[[], None] | None = None
        self.timers: list[Timer] = []

    def time(self) -> float:
        return self.now

    def add_reader(self, descriptor: int, call: Callable[[], None]) -> None:
        assert descriptor == FD
        self.reader = call

    def remove_reader(self, descriptor: int) -> None:
        self.reader = None

    def call_later(self, delay: float, call: Callable[[], None]) -> Timer:
        self.timers.append(Timer(self.now + delay, call))
        return self.timers[-1]

    def fire(self) -> None:
        """The only timer's time has come."""
        [timer] = self.timers
        self.timers = []
        self.now = timer.at
        timer.call()


class Flows:
    """A descriptor with flows that wait."""

    def __init__(self) -> None:
        self.waiting = 0
        self.batches: list[int] = []

    def read(self) -> int:
        batch, self.waiting = self.waiting, 0
        self.batches.append(batch)
        return batch


@pytest.fixture
def loop() -> Any:
    return Loop()


@pytest.fixture
def flows() -> Flows:
    return Flows()


def test_the_first_flow_after_a_silence_is_read_at_once(loop: Any, flows: Flows) -> None:
    PacedReader(loop, FD, flows.read)
    flows.waiting = 1
    loop.reader()
    assert flows.batches == [1]
    assert loop.reader is None


def test_what_comes_in_the_pause_is_read_together(loop: Any, flows: Flows) -> None:
    PacedReader(loop, FD, flows.read)
    flows.waiting = 1
    loop.reader()
    flows.waiting = 25
    loop.fire()
    assert flows.batches == [1, 25]


def test_after_a_pause_without_flows_the_descriptor_is_watched_again(
    loop: Any, flows: Flows
) -> None:
    PacedReader(loop, FD, flows.read)
    flows.waiting = 1
    loop.reader()
    loop.fire()
    assert loop.timers == []
    assert loop.reader is not None


def test_nothing_is_read_after_the_end(loop: Any, flows: Flows) -> None:
    paced = PacedReader(loop, FD, flows.read)
    flows.waiting = 1
    loop.reader()
    paced.close()
    assert loop.reader is None
    assert loop.timers[0].cancelled


@pytest.mark.parametrize(
    ("flows", "elapsed_s", "pause"),
    [
        pytest.param(1, 0.010, LONGEST_S, id="few: no flow waits longer"),
        pytest.param(50, 0.005, 0.005, id="ten thousand a second"),
        pytest.param(1000, 0.010, SHORTEST_S, id="a hundred thousand a second"),
    ],
)
def test_the_pause_follows_the_rate(flows: int, elapsed_s: float, pause: float) -> None:
    assert pause_s(flows, elapsed_s) == pytest.approx(pause)
