"""What a run has brought, for programs and for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from tests.chaos.judge import Verdict
from tests.chaos.run import Outcome
from tests.chaos.timeline import Done


def make(outcome: Outcome) -> dict[str, Any]:
    """The report; `passed` says whether nothing is wrong."""
    lost = {verdict.record.flow for verdict in outcome.verdicts}
    explained = [_lost(verdict) for verdict in outcome.verdicts if verdict.why]
    unexplained = [_lost(verdict) for verdict in outcome.verdicts if not verdict.why]
    unexplained += [{"what": stray} for stray in outcome.strays]
    wrong = {
        "lost_unexplained": unexplained,
        "leaked_packets": outcome.leaked,
        "leftovers": outcome.leftovers,
        "disagreements": outcome.disagreements,
        "growths": outcome.growths,
        "not_done": outcome.errors,
    }
    return {
        "passed": not any(wrong.values()),
        "seed": outcome.schedule.seed,
        "started": outcome.started,
        "duration_s": outcome.schedule.seconds,
        "flows": len(outcome.records),
        "survived": sum(record.flow not in lost for record in outcome.records),
        **wrong,
        "lost_explained": explained,
        "leaks": outcome.leaks,
        "agents": outcome.agents,
        "kernels": outcome.kernels,
        "schedule": [_done(done) for done in sorted(outcome.done, key=lambda d: d.begun)],
        "holders": [
            {"at": round(at, 2)} | {address: sorted(aps) for address, aps in sorted(held.items())}
            for at, held in outcome.holders
        ],
        "silences": _silences(outcome),
    }


def _lost(verdict: Verdict) -> dict[str, Any]:
    record = verdict.record
    return {
        "flow": record.flow,
        "kind": record.kind,
        "client": record.client,
        "port": record.port,
        "seen_as": [[round(at, 3), address] for at, address in record.seen],
        "opened_at": record.opened and round(record.opened, 3),
        "last_at": record.last and round(record.last, 3),
        "lost_at": round(verdict.at, 3),
        "how": verdict.how,
        "why": verdict.why,
    }


def _done(done: Done) -> dict[str, Any]:
    what = {"what": done.what, "at": round(done.begun, 3), "done_at": round(done.done, 3)}
    if done.fault is not None:
        what |= {"fault": str(done.fault), "planned_at": round(done.fault.begin, 3)}
    if done.roam is not None:
        what |= {"client": done.roam.client, "to": done.roam.ap}
    if done.ap:
        what |= {"ap": done.ap}
    return what


def _silences(outcome: Outcome) -> dict[str, int]:
    """How many times flows were silent for so long (s), whatever the cause."""
    lengths = [end - begin for record in outcome.records for begin, end in record.gaps]
    found = Counter(next(s for s in (1, 2, 3, 5, 10, 1000) if length < s) for length in lengths)
    return {f"under {seconds}": found[seconds] for seconds in sorted(found)}


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The report in short."""
    yield f"{report['survived']} of {report['flows']} flows survived"
    causes = Counter(one["why"].partition(", from")[0] for one in report["lost_explained"])
    for cause, count in causes.most_common():
        yield f"  {count} lost: {cause}"
    for one in report["lost_unexplained"]:
        yield f"  LOST, and nothing explains it: {one}"
    for what in ("disagreements", "leftovers", "growths", "not_done", "leaks"):
        for line in report[what]:
            yield f"  {what.upper()}: {line}"
    yield f"leaked packets: {report['leaked_packets']}"
    yield "passed" if report["passed"] else "FAILED"
