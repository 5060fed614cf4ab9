"""What a roam costs a client, with few and many sessions, against the same move by hand."""

from __future__ import annotations

from collections.abc import Callable

from apagent.lab.traffic.running import serving
from tests.bench.by_hand import ByHand
from tests.bench.contenders import CLIENT, Apagent
from tests.bench.distribution import cumulative_chart, percentile
from tests.bench.replication import open_flows
from tests.bench.roam import BUDGET_GAP_MS, Case, Roam, roams
from tests.bench.rows import Row, compared
from tests.bench.runner import Group, Result, Samples, Trial
from tests.bench.scale import Scale

SIDES = ("apagent", "by hand")


def groups(scale: Scale) -> list[Group]:
    """One group; the carrier stays up, as between the radios of one network."""
    trials = [
        Trial(_case(sessions), side, measure(sessions, scale))
        for sessions in scale.roam_sessions
        for side, measure in zip(SIDES, (_with_agents, _by_hand), strict=True)
    ]
    return [
        Group("roam", scale.few, trials, lambda s: _rows(s, scale), lambda s: _charts(s, scale))
    ]


def _case(sessions: int) -> str:
    return "1 session" if sessions == 1 else f"{sessions:,} sessions"


def _with_agents(sessions: int, scale: Scale) -> Callable[[], Result]:
    def measure() -> Result:
        with Apagent(3) as world, serving(world.lab):
            open_flows(world, max(1, sessions - 1))
            found = roams(world.lab, scale.roams, scale.roam_dwell_s, carrier=False)
            return _result(sessions, found)

    return measure


def _by_hand(sessions: int, scale: Scale) -> Callable[[], Result]:
    def measure() -> Result:
        with Apagent(3) as world, serving(world.lab):
            open_flows(world, max(1, sessions - 1))
            lab = world.lab
            # The echo's flow, opened while the agents still run, is preloaded by the time they end.
            hand = ByHand(lab, CLIENT)
            found = roams(lab, scale.roams, scale.roam_dwell_s, carrier=False, mover=hand.take_over)
            hand.close()
            return _result(sessions, found)

    return measure


def _result(sessions: int, found: list[Roam]) -> Result:
    case = Case.of(sessions, found, carrier=False)
    return {
        "gap_ms_p50": case.gap_ms_p50,
        "gap_ms_p99": case.gap_ms_p99,
        "gap_ms_max": case.gap_ms_max,
        "lost_p50": case.lost_p50,
        "lost_p99": case.lost_p99,
        "gaps_ms": case.gaps_ms,
        "lost": [roam.lost for roam in found],
    }


def _pooled(samples: Samples, case: str, side: str, key: str) -> list[float]:
    """All roams of all rounds: percentiles of few roams say little."""
    return [value for result in samples.of(case, side) for value in result[key]]


def _rows(samples: Samples, scale: Scale) -> list[Row]:
    rows = []
    for sessions in scale.roam_sessions:
        case = _case(sessions)
        pooled = [_pooled(samples, case, side, "gaps_ms") for side in SIDES]
        if not all(pooled):
            continue
        rows += compared(
            f"roam.gap.{sessions}",
            f"interruption by a roam, p99, {case}",
            [(percentile(pooled[0], 99), percentile(pooled[1], 99))],
            "ms",
            "by hand",
            at_most=BUDGET_GAP_MS,
            ratio_at_most=1.5,
        )
        lost = [_pooled(samples, case, side, "lost") for side in SIDES]
        rows += compared(
            f"roam.lost.{sessions}",
            f"echoes lost by a roam, p99, {case}",
            [(percentile(lost[0], 99), percentile(lost[1], 99))],
            "echoes",
            "by hand",
        )
    return rows + _flat_rows(samples, scale)


def _flat_rows(samples: Samples, scale: Scale) -> list[Row]:
    """The most sessions against the fewest."""
    few, many = _case(scale.roam_sessions[0]), _case(scale.roam_sessions[-1])
    pooled = [_pooled(samples, case, SIDES[0], "gaps_ms") for case in (many, few)]
    if few == many or not all(pooled):
        return []
    return compared(
        "roam.flat",
        f"interruption by a roam, median, {many}",
        [(percentile(pooled[0], 50), percentile(pooled[1], 50))],
        "ms",
        few,
        ratio_at_most=1.25,
    )


def _charts(samples: Samples, scale: Scale) -> dict[str, str]:
    curves = {
        f"{_case(sessions)}, {side}": pooled
        for sessions in scale.roam_sessions
        for side in SIDES
        if (pooled := _pooled(samples, _case(sessions), side, "gaps_ms"))
    }
    if not curves:
        return {}
    title = "Time from link up at the new AP to the first echo"
    return {"roams.svg": cumulative_chart(title, curves, BUDGET_GAP_MS)}
