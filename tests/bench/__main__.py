"""Measures what DESIGN.md and the README claim, and writes it down: `make bench`.

Every group's results are kept as they come, so a run that was broken off goes on where it was
(--resume), and single groups can be measured again (--only).
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
from pathlib import Path

from tests.bench import (
    growth,
    latency,
    lifecycle,
    path,
    replication,
    report,
    resync,
    roaming,
    stages,
    succession,
)
from tests.bench.runner import Group, Runner, say
from tests.bench.scale import FULL, QUICK, Scale

_MODULES = (replication, latency, roaming, path, lifecycle, resync, succession, growth, stages)


def main(argv: list[str] | None = None) -> int:
    """Run it; 0, also where a goal is missed: that is a result, and no failure."""
    options = _options(argv)
    chosen = [group for group in _groups(QUICK if options.quick else FULL) if options.takes(group)]
    if options.names:
        sys.stdout.writelines(f"{group.name}\n" for group in chosen)
        return 0
    options.output.mkdir(parents=True, exist_ok=True)
    runner = Runner(options.output)
    if not (options.resume or options.report):
        for group in chosen:
            runner.forget(group)
    rows = []
    for group in chosen:
        samples = runner.load(group) if options.report else runner.run(group)
        rows += group.rows(samples)
        for name, picture in group.charts(samples).items():
            (options.output / name).write_text(picture, encoding="utf-8")
    report.write(options.output, report.machine(), rows)
    sys.stdout.write(report.table(rows) + "\n")
    say(f"wrote {options.output}/summary.json, summary.md and raw/")
    return 0


class _Options(argparse.Namespace):
    quick: bool
    names: bool
    resume: bool
    report: bool
    only: list[str]
    output: Path

    def takes(self, group: Group) -> bool:
        """Whether the group is wanted."""
        return not self.only or any(fnmatch.fnmatch(group.name, wanted) for wanted in self.only)


def _options(argv: list[str] | None) -> _Options:
    made = argparse.ArgumentParser(prog="make bench", description=__doc__)
    made.add_argument("--quick", action="store_true", help="a quick look, below two minutes")
    made.add_argument("--list", dest="names", action="store_true", help="name the groups")
    made.add_argument("--resume", action="store_true", help="go on with what is in OUTPUT/raw")
    made.add_argument("--report", action="store_true", help="measure nothing, only report")
    made.add_argument("--only", action="append", default=[], help="groups, also by pattern")
    made.add_argument("--output", type=Path, default=Path("bench-out"))
    return made.parse_args(argv, namespace=_Options())


def _groups(scale: Scale) -> list[Group]:
    return [group for module in _MODULES for group in module.groups(scale)]


if __name__ == "__main__":
    sys.exit(main())
