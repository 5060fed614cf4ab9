"""Let clients with real applications roam at random for a while, and report what became of them.

Writes OUT/report.json, and the agents' logs next to it. Exit code 0: nothing was broken, 1:
something was.
"""

from __future__ import annotations

import argparse
import datetime as dt
import heapq
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from apagent.lab.lab import Lab
from apagent.lab.place import PREFIX_VARIABLE, Place
from tests.applications.application import Roam
from tests.soak.fleet import CLIENTS, Member, finish_all, start_all

_DEFAULT_PREFIX = "soak-"
_DWELL_S = (0.2, 2.0)
_MARGIN_S = 120.0
"""What starting and finishing the fleet may take."""


def main(argv: list[str] | None = None) -> int:
    """Run the soak."""
    made = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    made.add_argument("--seconds", type=float, default=120.0, help="how long clients roam")
    made.add_argument("--aps", type=int, default=3)
    made.add_argument("--seed", type=int, default=1, help="of who roams when and where to")
    made.add_argument("--out", type=Path, default=Path("soak-out"), help="directory of the report")
    options = made.parse_args(argv)
    # A lab of its own: `apagent lab` and the demo may be up at the same time.
    place = Place.from_environment({PREFIX_VARIABLE: _DEFAULT_PREFIX, **os.environ})
    with (
        Lab(options.aps, CLIENTS, place=place, progress=_say) as lab,
        tempfile.TemporaryDirectory(prefix="apagent-soak-") as directory,
    ):
        options.out.mkdir(parents=True, exist_ok=True)
        report = _soak(lab, Path(directory), options)
        for ap in lab.aps:
            shutil.copyfile(lab.agents.log(ap), options.out / f"{ap}.log")
    file = options.out / "report.json"
    file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    _tell(report)
    _say(f"the report is {file}")
    return 0 if report["passed"] else 1


def _soak(lab: Lab, directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    memory = {"before": _resident_kib(lab)}
    _say("starting the applications")
    with lab.watch_for_leaks() as leaks:
        members = start_all(lab, directory, options.seconds + _MARGIN_S)
        try:
            roams = _roam(lab, members, options)
            _say("finishing the applications")
            finish_all(members)
        finally:
            for member in members:
                member.close()
    memory["after"] = _resident_kib(lab)
    applications = [member.report() for member in members]
    return {
        "passed": all(one["passed"] for one in applications) and leaks.count() == 0,
        "seconds": options.seconds,
        "seed": options.seed,
        "aps": options.aps,
        "roams": roams,
        "leaked_packets": leaks.count(),
        "agents_resident_kib": memory,
        "applications": applications,
    }


def _roam(
    lab: Lab, members: Sequence[Member], options: argparse.Namespace
) -> list[dict[str, object]]:
    """Let all clients roam until the time is over; every roam."""
    _say(f"{len(lab.clients)} clients roam for {options.seconds:g} s")
    roams: list[dict[str, object]] = []
    end = time.monotonic() + options.seconds
    for client, there, carrier in _plan(lab, random.Random(options.seed)):
        at = dt.datetime.now().astimezone().isoformat(timespec="milliseconds")
        roam = Roam(client, there, lab.roam(client, there, carrier=carrier))
        roams.append({"client": client, "to": there, "carrier_dropped": carrier, "at": at})
        for member in members:
            member.roamed(roam)
        if time.monotonic() > end:
            break
    time.sleep(_DWELL_S[1])
    return roams


def _plan(lab: Lab, generator: random.Random) -> Iterator[tuple[str, str, bool]]:
    """Endless roams, each when it is due: who, where to, whether the carrier drops."""
    where = {client: lab.location(client) for client in lab.clients}
    due = [(time.monotonic() + generator.uniform(*_DWELL_S), client) for client in lab.clients]
    heapq.heapify(due)
    while due:
        at, client = heapq.heappop(due)
        time.sleep(max(0.0, at - time.monotonic()))
        where[client] = generator.choice([ap for ap in lab.aps if ap != where[client]])
        yield client, where[client], generator.random() < 0.5
        # From now on: roams that come late must not come in a burst, which no client would do.
        heapq.heappush(due, (time.monotonic() + generator.uniform(*_DWELL_S), client))


def _resident_kib(lab: Lab) -> dict[str, int]:
    """Memory of each agent."""
    found = {}
    for ap in lab.aps:
        status = Path(f"/proc/{lab.agent_pid(ap)}/status").read_text(encoding="ascii")
        line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        found[ap] = int(line.split()[1])
    return found


def _tell(report: dict[str, Any]) -> None:
    for one in report["applications"]:
        _say(f"{'passed' if one['passed'] else 'BROKEN'}: {one['name']}, {one['roams']} roams")
        for line in (one["reason"], *(f"{key}: {value}" for key, value in _short(one["figures"]))):
            if line:
                _say(f"    {line}")
    _say(f"leaked packets: {report['leaked_packets']}")


def _short(figures: dict[str, object]) -> Iterator[tuple[str, object]]:
    """Figures, with lists of numbers as their median and maximum."""
    for key, value in figures.items():
        if isinstance(value, dict):
            yield key, {name: _median_and_maximum(numbers) for name, numbers in value.items()}
        elif isinstance(value, list):
            yield key, _median_and_maximum(value)
        else:
            yield key, value


def _median_and_maximum(numbers: list[float]) -> str:
    ordered = sorted(numbers)
    return f"p50 {ordered[len(ordered) // 2]}, max {ordered[-1]}" if ordered else "none"


def _say(text: str) -> None:
    sys.stderr.write(f"soak: {text}\n")


if __name__ == "__main__":
    sys.exit(main())
