"""One run: break, mend, wait, judge, clean up."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apagent.lab.lab import Lab
from tests.chaos import leftovers
from tests.chaos.agreement import disagreements
from tests.chaos.evidence import errors, keep_logs, keep_state
from tests.chaos.executor import Executor
from tests.chaos.flows import flowing
from tests.chaos.holders import Holdings, watching_holders
from tests.chaos.judge import Verdict, judge
from tests.chaos.record import Record, records
from tests.chaos.schedule import Schedule
from tests.chaos.timeline import Done, Timeline
from tests.chaos.watch import kernel_figures, watching

_MARGIN_S = 120.0
"""What the beginning and the end of a run may take."""
_QUIET_S = 5.0
"""After all is mended, until flows are asked to end."""
_FINISH_S = 20.0
_AGREE_S = 30.0


@dataclass(slots=True)
class Outcome:
    """All that a run has brought."""

    schedule: Schedule
    done: list[Done]
    holders: list[tuple[float, Holdings]]
    records: list[Record]
    verdicts: list[Verdict]
    """On the flows that were lost, or silent without a cause."""
    strays: list[str]
    """What the server received and nobody has sent."""
    disagreements: list[str]
    leaked: int
    leaks: list[str]
    leftovers: list[str]
    errors: list[str]
    started: str = ""
    """By the agents' logs."""
    growths: list[str] = field(default_factory=list)
    agents: list[dict[str, Any]] = field(default_factory=list)
    kernels: dict[str, Any] = field(default_factory=dict)


def run(lab: Lab, schedule: Schedule, out: Path, say: Callable[[str], None]) -> Outcome:
    """Run a schedule in a lab that is up, and leave the lab without agents."""
    kernels: dict[str, Any] = {"begin": kernel_figures(lab)}
    with (
        lab.watch_for_leaks() as leaks,
        watching(lab) as watch,
        watching_holders(lab) as holders,
        flowing(lab, schedule.seconds + _MARGIN_S) as flows,
    ):
        executor = Executor(lab, flows, schedule, say)
        say(f"{len(schedule.faults)} faults in {schedule.seconds:g} s, seed {schedule.seed}")
        executor.run()
        say("everything is mended; waiting for quiet")
        time.sleep(_QUIET_S)
        wrong = disagreements(lab, _AGREE_S)
        kernels["end"] = kernel_figures(lab)
        say("ending the flows")
        keep_state(lab, out)
        ended, seen = flows.finish(_FINISH_S)
    kinds = {talk.number: talk.kind for talk in schedule.talks}
    made = records(kinds, ended, seen, executor.start_ns)
    held = [(at - executor.start_ns / 1e9, found) for at, found in holders.changes]
    timeline = Timeline(schedule.homes, lab.aps, executor.done, held)
    say("cleaning up")
    keep_logs(lab, out)
    return Outcome(
        schedule,
        executor.done,
        held,
        made,
        [verdict for record in made if (verdict := judge(record, timeline))],
        [e["reason"] for e in seen if e["event"] == "broken" and e["flow"] not in kinds],
        [*wrong, *errors(lab)],
        leaks.count(),
        [str(packet) for packet in leaks.packets()[:20]],
        leftovers.clean_up(lab),
        executor.errors,
        growths=watch.growths(),
        agents=watch.report(),
        kernels=kernels,
        started=executor.started,
    )
