"""Break everything in a roam domain, at random but from a seed, and judge what became of its flows.

Writes OUT/report.json, and next to it each agent's log and what its AP's kernel held at the end.
Exit code 0: all that could survive has, and nothing leaked or was left; 1: something didn't. The
same seed, numbers and time give the same schedule.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from apagent.lab.lab import Lab
from apagent.lab.place import PREFIX_VARIABLE, Place
from tests.chaos import leftovers, report, sabotage
from tests.chaos.run import Outcome, run
from tests.chaos.schedule import plan

_DEFAULT_PREFIX = "chaos-"


def main(argv: list[str] | None = None) -> int:
    """Run it."""
    options = _parser().parse_args(argv)
    # A lab of its own: `apagent lab` and the demo may be up at the same time.
    place = Place.from_environment({PREFIX_VARIABLE: _DEFAULT_PREFIX, **os.environ})
    lab = Lab(options.aps, options.clients, place=place, takeover=options.takeover, progress=_say)
    homes = {c: lab.aps[i % len(lab.aps)] for i, c in enumerate(lab.clients)}
    schedule = plan(options.seed, options.seconds, homes, lab.aps, calm=options.calm)
    if options.plan:
        sys.stdout.writelines(f"{line}\n" for line in schedule.lines())
        return 0
    for ap in options.sabotage:
        lab.agents.commands[ap] = sabotage.command()
    options.out.mkdir(parents=True, exist_ok=True)
    with lab:
        inside = leftovers.identities(lab)
        outcome = run(lab, schedule, options.out, _say)
    outcome.leftovers += leftovers.after(place, inside)
    return _conclude(schedule.seed, outcome, options.out)


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    made.add_argument("--seconds", type=float, default=120.0, help="how long things go wrong")
    made.add_argument("--seed", type=int, default=1, help="of all that happens")
    made.add_argument("--aps", type=int, default=4)
    made.add_argument("--clients", type=int, default=16)
    made.add_argument("--takeover", action=argparse.BooleanOptionalAction, default=True)
    made.add_argument("--out", type=Path, default=Path("chaos-out"), help="directory of the report")
    made.add_argument("--calm", action="store_true", help="nothing breaks; clients only roam")
    made.add_argument("--plan", action="store_true", help="print the schedule and do nothing")
    made.add_argument(
        "--sabotage",
        metavar="AP",
        action="append",
        default=[],
        help="run an agent there that forgets its peers' sessions: must fail",
    )
    return made


def _conclude(seed: int, outcome: Outcome, out: Path) -> int:
    made = report.make(outcome)
    file = out / "report.json"
    file.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    for line in report.lines(made):
        _say(line)
    _say(f"the report is {file}; the same again: --seed {seed}")
    return 0 if made["passed"] else 1


def _say(text: str) -> None:
    sys.stderr.write(f"chaos: {text}\n")


if __name__ == "__main__":
    sys.exit(main())
