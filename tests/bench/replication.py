"""What it costs to tell another AP's kernel of a flow, and how many a second that goes well."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from apagent.lab.errors import LabError
from tests.bench.contenders import CLIENT, Apagent, Conntrackd, Contender
from tests.bench.cost import cpu_of_all_s, cpu_s
from tests.bench.generator import generating
from tests.bench.rows import Row, compared
from tests.bench.runner import Group, Result, Samples, Trial
from tests.bench.scale import Scale

SIDES = ("apagent", "conntrackd")
_POLL_S = 0.02
_STALLED_S = 5.0
_SETTLE_S = 0.5
_MICRO = 1e6

Make = Callable[[], contextlib.AbstractContextManager[Contender]]
MAKERS: dict[str, Make] = {"apagent": Apagent, "conntrackd": Conntrackd}


def groups(scale: Scale) -> list[Group]:
    """CPU time at given rates, and the highest rate."""
    cases = [("5,000/s", 5_000), ("20,000/s", 20_000), ("as fast as they come", 0)]
    cost = [
        Trial(case, side, _cost(MAKERS[side], rate, scale))
        for case, rate in cases
        for side in SIDES
    ]
    highest = [Trial("ramp", side, _highest(MAKERS[side], scale)) for side in SIDES]
    return [
        Group("replication-cpu", scale.rounds, cost, _cost_rows),
        Group("replication-rate", scale.few, highest, _highest_rows),
    ]


def replicate(contender: Contender, flows: int, rate: float, first: int = 0) -> dict[str, Any]:
    """Open flows and wait until every other AP's kernel has them, or nothing happens any more."""
    options = ("--flows", flows, "--rate", rate, "--first", first)
    with generating(contender.lab, CLIENT, *options) as generator:
        before = contender.replicated()
        clocks = cpu_s(contender.sender), cpu_of_all_s(contender.receivers)
        started = time.monotonic()
        generator.start()
        there, took_s = _wait(contender, before, flows, started)
        time.sleep(_SETTLE_S)
        sender_s = cpu_s(contender.sender) - clocks[0]
        receivers_s = cpu_of_all_s(contender.receivers) - clocks[1]
        sent = generator.result()
    return {
        "flows": flows,
        "replicated": there,
        "took_s": took_s,
        "rate_sent": flows / ((sent["ended_ns"] - sent["began_ns"]) / 1e9),
        "sender_us": sender_s / flows * _MICRO,
        "receivers_us": receivers_s / flows * _MICRO,
        "both_us": (sender_s + receivers_s) / flows * _MICRO,
        "losses": contender.losses(),
    }


def open_flows(contender: Contender, flows: int, rate: float = 15_000) -> None:
    """Open flows, and wait until every other AP's kernel has them. Raises LabError."""
    result = replicate(contender, flows, rate)
    if result["replicated"] < flows:
        raise LabError(f"{result['replicated']} of {flows} flows were replicated")


def _wait(contender: Contender, before: int, flows: int, started: float) -> tuple[int, float]:
    """How many came, and after how many seconds the last one did."""
    there, changed = 0, started
    while there < flows and time.monotonic() - changed < _STALLED_S:
        time.sleep(_POLL_S)
        now = contender.replicated() - before
        if now != there:
            there, changed = now, time.monotonic()
    return there, changed - started


def _cost(make: Make, rate: float, scale: Scale) -> Callable[[], Result]:
    def measure() -> Result:
        with make() as contender:
            flows = int(rate * scale.load_s) if rate else scale.burst
            return replicate(contender, min(flows, scale.most_flows), rate)

    return measure


def _cost_rows(samples: Samples) -> list[Row]:
    return [
        row
        for case in ("5,000/s", "20,000/s", "as fast as they come")
        for row in compared(
            f"replication.cpu.{case.split('/')[0].replace(',', '').replace(' ', '-')}",
            f"CPU per replicated flow, both ends, {case}",
            samples.pairs(case, SIDES, "both_us"),
            "µs",
            "conntrackd",
            ratio_at_most=0.5,
        )
    ]


def _highest(make: Make, scale: Scale) -> Callable[[], Result]:
    def measure() -> Result:
        best = 0.0
        tried = []
        for rate in scale.ramp:
            with make() as contender:
                flows = min(int(rate * scale.ramp_s), scale.most_flows)
                result = replicate(contender, flows, rate)
            # What takes longer than the flows take to come has built up a queue.
            kept_up = result["took_s"] < flows / rate * 1.1 + 0.2
            whole = result["replicated"] >= flows and not result["losses"]
            tried.append({**result, "rate": rate, "kept_up": kept_up, "whole": whole})
            if not (whole and kept_up):
                break
            best = min(rate, result["rate_sent"])
        return {"rate": best, "tried": tried}

    return measure


def _highest_rows(samples: Samples) -> list[Row]:
    return compared(
        "replication.rate",
        "highest rate of new flows without loss",
        samples.pairs("ramp", SIDES, "rate"),
        "flows/s",
        "conntrackd",
        ratio_at_least=1.0,
    )
