"""Runs trials interleaved, keeps every result as it comes, and goes on where a run was broken off.

A group is a list of trials that belong together. One round goes through all of them, so that what
is compared takes turns (A B A B …) and a machine that is busy for a while is so for both.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from apagent.errors import KernelFault
from apagent.lab.errors import LabError
from tests.bench.rows import Row

Result = Mapping[str, Any]
_MEASURE_FAILED = (LabError, KernelFault, OSError, RuntimeError, TimeoutError)


@dataclass(frozen=True, slots=True)
class Trial:
    """One thing to measure: `side` is what is measured, `case` under which conditions."""

    case: str
    side: str
    measure: Callable[[], Result]


@dataclass(frozen=True, slots=True)
class Group:
    """Trials that are run in turns, and what their results say."""

    name: str
    rounds: int
    trials: Sequence[Trial]
    rows: Callable[[Samples], list[Row]]
    charts: Callable[[Samples], Mapping[str, str]] = lambda _: {}
    """SVG by file name."""


class Samples:
    """All results of a group so far."""

    def __init__(self) -> None:
        self._results: dict[tuple[str, str], dict[int, Result]] = {}

    def add(self, case: str, side: str, number: int, result: Result) -> None:
        """Take one in."""
        self._results.setdefault((case, side), {})[number] = result

    def has(self, case: str, side: str, number: int) -> bool:
        """Whether it is there already."""
        return number in self._results.get((case, side), {})

    def cases(self) -> list[str]:
        """Everything that was measured, in order."""
        return list(dict.fromkeys(case for case, _ in self._results))

    def of(self, case: str, side: str) -> list[Result]:
        """The results of all rounds; empty: never measured."""
        return list(self._results.get((case, side), {}).values())

    def values(self, case: str, side: str, key: str) -> list[float]:
        """One number of each round."""
        return [float(result[key]) for result in self.of(case, side)]

    def median(self, case: str, side: str, key: str) -> float:
        """The median of one number."""
        return median(self.values(case, side, key))

    def pairs(self, case: str, sides: tuple[str, str], key: str) -> list[tuple[float, float]]:
        """One number of two sides, from the rounds that have both."""
        return self._both((case, sides[0]), (case, sides[1]), key)

    def across(self, cases: tuple[str, str], side: str, key: str) -> list[tuple[float, float]]:
        """One number of two cases, from the rounds that have both."""
        return self._both((cases[0], side), (cases[1], side), key)

    def _both(
        self, first: tuple[str, str], second: tuple[str, str], key: str
    ) -> list[tuple[float, float]]:
        one, other = self._results.get(first, {}), self._results.get(second, {})
        return [
            (float(one[number][key]), float(other[number][key]))
            for number in sorted(one.keys() & other.keys())
        ]


class Runner:
    """Keeps what was measured in `directory`/raw, a file for each group."""

    def __init__(self, directory: Path) -> None:
        self._raw = directory / "raw"
        self._raw.mkdir(parents=True, exist_ok=True)

    def run(self, group: Group) -> Samples:
        """Run what isn't there yet. A trial that fails is told and left out."""
        samples = self.load(group)
        for number in range(group.rounds):
            for trial in group.trials:
                if not samples.has(trial.case, trial.side, number):
                    self._measure(group, trial, number, samples)
        return samples

    def forget(self, group: Group) -> None:
        """Throw away what earlier runs have left."""
        self._file(group).unlink(missing_ok=True)

    def load(self, group: Group) -> Samples:
        """What earlier runs have left."""
        samples = Samples()
        for one in _lines(self._file(group)):
            samples.add(one["case"], one["side"], one["round"], one["result"])
        return samples

    def _measure(self, group: Group, trial: Trial, number: int, samples: Samples) -> None:
        say(f"{group.name}: {trial.case}, {trial.side}, round {number + 1} of {group.rounds}")
        load = os.getloadavg()[0]
        began = time.monotonic()
        try:
            result = trial.measure()
        except _MEASURE_FAILED as error:
            say(f"    failed: {error}")
            return
        samples.add(trial.case, trial.side, number, result)
        line = {
            "case": trial.case,
            "side": trial.side,
            "round": number,
            "load": load,
            "took_s": round(time.monotonic() - began, 1),
            "result": result,
        }
        with self._file(group).open("a", encoding="utf-8") as raw:
            raw.write(json.dumps(line) + "\n")
        say("    " + _brief(result))

    def _file(self, group: Group) -> Path:
        return self._raw / f"{group.name}.jsonl"


def say(text: str) -> None:
    """A measurement talks."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    if file.exists():
        with file.open(encoding="utf-8") as raw:
            yield from map(json.loads, raw)


def _brief(result: Result) -> str:
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in result.items()
        if not isinstance(value, list)
    )
