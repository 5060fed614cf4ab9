"""How soon every other AP's kernel knows a new flow."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from apagent.lab.errors import LabError
from tests.bench.contenders import ANCHOR, CLIENT, Apagent, Conntrackd, Contender
from tests.bench.distribution import cumulative_chart, percentile
from tests.bench.generator import generating
from tests.bench.rows import Row, alone, compared
from tests.bench.runner import Group, Result, Samples, Trial
from tests.bench.scale import Scale

_STALLED_S, _POLL_S = 3.0, 0.1
_LIMIT_MS = 10.0
_RATES = (1_000, 10_000, 20_000)
_PEERS = (1, 3, 8)
_PATIENCE_S = 60.0
_SIDES = ("apagent", "conntrackd")


def groups(scale: Scale) -> list[Group]:
    """One group: all rates, with one peer against conntrackd, and with more."""
    trials = []
    for rate in scale.latency_rates:
        for peers in scale.latency_peers:
            case = _case(rate, peers)
            trials.append(Trial(case, "apagent", _measure(_apagent(peers), rate, scale)))
            if peers == 1:
                trials.append(Trial(case, "conntrackd", _measure(Conntrackd, rate, scale)))
    return [Group("latency", scale.few, trials, _rows, _charts)]


def _apagent(peers: int) -> Callable[[], contextlib.AbstractContextManager[Contender]]:
    return partial(Apagent, peers + 1)


def _case(rate: int, peers: int) -> str:
    return f"{rate:,}/s, {peers} {'peer' if peers == 1 else 'peers'}"


def _measure(
    make: Callable[[], contextlib.AbstractContextManager[Contender]], rate: int, scale: Scale
) -> Callable[[], Result]:
    def measure() -> Result:
        flows = int(rate * scale.latency_s)
        with make() as contender:
            options = ("--flows", flows, "--rate", rate)
            with (
                _watching(contender) as seen,
                generating(contender.lab, CLIENT, *options) as generator,
            ):
                before = contender.replicated()
                generator.start()
                generator.result()
                _wait(contender, before + flows)
            return _summary(seen, contender.losses())

    return measure


def _wait(contender: Contender, wanted: int) -> None:
    last, changed = -1, time.monotonic()
    while (now := contender.replicated()) < wanted and time.monotonic() - changed < _STALLED_S:
        if now != last:
            last, changed = now, time.monotonic()
        time.sleep(_POLL_S)


def _summary(seen: dict[str, Any], losses: int) -> Result:
    """Of all peers together: a flow is there when the last one has it, so the worst one counts."""
    by_peer = [[us / 1000 for us in latencies] for latencies in seen["latencies_us"]]
    if not all(by_peer):
        raise LabError("a peer's kernel got none of the flows that were watched")
    worst = max(by_peer, key=lambda latencies: percentile(latencies, 99))
    ordered = sorted(latency for latencies in by_peer for latency in latencies)
    return {
        "watched": seen["watched"],
        "missing": seen["watched"] * len(by_peer) - len(ordered),
        "losses": losses,
        "p50_ms": percentile(worst, 50),
        "p99_ms": percentile(worst, 99),
        "max_ms": worst and max(worst),
        "percentiles_ms": [round(percentile(ordered, percent), 3) for percent in range(1, 101)],
    }


@contextlib.contextmanager
def _watching(contender: Contender) -> Iterator[dict[str, Any]]:
    """Run `tests.bench.watch` for the block; the dictionary holds its result after it."""
    lab = contender.lab
    others = [lab.namespace(ap) for ap in lab.aps if ap != ANCHOR]
    kind = ["--conntrack"] if contender.name == "conntrackd" else []
    anchor = ["--anchor", lab.namespace(ANCHOR)]
    argv = [sys.executable, "-m", "tests.bench.watch", *anchor, *kind, *others]
    result: dict[str, Any] = {}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            if process.stdout is None or not process.stdout.readline():
                raise LabError("the watching program ended before it was ready")
            yield result
            process.send_signal(signal.SIGTERM)
            result.update(json.loads(process.stdout.readline()))
        finally:
            process.kill()


def _rows(samples: Samples) -> list[Row]:
    rows = []
    for rate in _RATES:
        limit = _LIMIT_MS if rate == 10_000 else None
        for peers in _PEERS:
            case = _case(rate, peers)
            id_ = f"latency.{rate}.{peers}"
            what = f"first packet to the entry in every peer, p99, {case}"
            if peers == 1:
                pairs = samples.pairs(case, _SIDES, "p99_ms")
                rows += compared(
                    id_, what, pairs, "ms", "conntrackd", ratio_at_most=1.0, at_most=limit
                )
            else:
                values = samples.values(case, "apagent", "p99_ms")
                rows += alone(id_, what, values, "ms", at_most=limit)
    return rows


def _charts(samples: Samples) -> dict[str, str]:
    curves = {}
    for peers in _PEERS:
        for side in _SIDES:
            results = samples.of(_case(10_000, peers), side)
            if results:
                name = f"{side}, {peers} {'peer' if peers == 1 else 'peers'}"
                curves[name] = [ms for result in results for ms in result["percentiles_ms"]]
    if not curves:
        return {}
    title = "From a flow's first packet to its entry in a peer's kernel, 10,000 flows/s"
    return {"latency.svg": cumulative_chart(title, curves, _LIMIT_MS)}
