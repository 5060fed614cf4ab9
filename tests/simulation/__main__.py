"""Simulate roam domains, thousands of them: each seed is one, and a failing one can be replayed."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from tests.simulation.scenario import Scenario, parse
from tests.simulation.script import draw
from tests.simulation.simulate import Failure, failure, shrink, trace

TAIL = 40
"""Lines of a failing scenario's trace that are shown."""
CHUNK = 20
"""Seeds that a process gets at a time."""


def main(argv: list[str] | None = None) -> int:
    """Run the simulation; exit code 0: all held, 1: something didn't, 2: wrong usage."""
    options = _parser().parse_args(argv)
    if options.script is not None:
        return _replay(parse(options.script.read_text(encoding="ascii")), options)
    if options.seed is not None:
        return _replay(draw(options.seed, options.aps), options)
    return _run_many(options)


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    made.add_argument("--seeds", type=_range, default=range(5000), help="such as 0-4999")
    made.add_argument("--seed", type=int, help="replay this one")
    made.add_argument("--script", type=Path, help="replay a scenario in a file")
    made.add_argument("--aps", type=int, help="APs of each domain (default: 3 to 6, by the seed)")
    made.add_argument("--jobs", type=int, default=2, help="processes")
    made.add_argument("--trace", action="store_true", help="with one scenario: all that happens")
    made.add_argument("--shrink", action="store_true", help="with one: the least that still fails")
    return made


def _range(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def _run_many(options: argparse.Namespace) -> int:
    began = time.monotonic()
    failures = []
    for done, found in enumerate(_results(options), 1):
        if found is not None:
            failures.append(found)
            print(f"seed {found.scenario.seed}: {found.reason}", flush=True)
        if done % 1000 == 0:
            print(f"{done} seeds in {time.monotonic() - began:.0f} s", flush=True)
    for found in failures[:3]:
        _show(found)
    print(
        f"{len(options.seeds)} seeds in {time.monotonic() - began:.0f} s, {len(failures)} failed"
        + "".join(f"\n  --seed {found.scenario.seed}" for found in failures)
    )
    return 1 if failures else 0


def _results(options: argparse.Namespace) -> Iterator[Failure | None]:
    run = partial(_one, aps=options.aps)
    if options.jobs == 1:
        yield from map(run, options.seeds)
        return
    with ProcessPoolExecutor(options.jobs) as pool:
        yield from pool.map(run, options.seeds, chunksize=CHUNK)


def _one(seed: int, aps: int | None) -> Failure | None:
    return failure(draw(seed, aps))


def _show(found: Failure) -> None:
    print(f"\nseed {found.scenario.seed}, the end of its trace:")
    _print(trace(found.scenario)[-TAIL:])


def _replay(scenario: Scenario, options: argparse.Namespace) -> int:
    found = failure(scenario)
    if found is not None and options.shrink:
        found = shrink(found)
        print(found.scenario)
    shown = found.scenario if found else scenario
    if options.trace:
        _print(trace(shown))
    print(found.reason if found else f"all held: {len(scenario.steps)} steps")
    return 1 if found else 0


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(f"  {line}")


if __name__ == "__main__":
    sys.exit(main())
