"""How cost grows with peers and sessions: with the flows that change, not with those that don't."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.bench.contenders import CLIENT
from tests.bench.cost import cpu_s
from tests.bench.generator import generating
from tests.bench.lines import lines_chart
from tests.bench.rows import Row, compared
from tests.bench.runner import Group, Result, Samples, Trial
from tests.bench.scale import Scale
from tests.bench.simulated import Simulated, simulated

_RATE = 5_000
_SETTLE_S = 0.5
_FEW_SESSIONS = 100
_MICRO = 1e6


def groups(scale: Scale) -> list[Group]:
    """Simulated peers, and sessions held."""
    by_peers = [
        Trial(f"{peers} peers", side, measure(peers, _FEW_SESSIONS, scale))
        for peers in scale.growth_peers
        for side, measure in (("hears", _hears), ("tells", _tells))
    ]
    by_sessions = [
        Trial(f"{sessions:,} sessions", "hears", _hears(1, sessions, scale))
        for sessions in scale.growth_sessions
    ]
    return [
        Group(
            "growth-peers",
            1,
            by_peers,
            lambda samples: _peer_rows(samples, scale),
            lambda samples: _chart(samples, "peers", ("hears", "tells")),
        ),
        Group(
            "growth-sessions",
            scale.few,
            by_sessions,
            lambda samples: _session_rows(samples, scale),
            lambda samples: _chart(samples, "sessions", ("hears",)),
        ),
    ]


def _hears(peers: int, sessions: int, scale: Scale) -> Callable[[], Result]:
    """What ap1's agent spends on each new flow of one peer, the others being quiet."""

    def measure() -> Result:
        with simulated(peers, sessions) as world:
            held = peers * sessions
            world.wait_for_flows(held)
            before = cpu_s(world.agent)
            world.command(do="churn", rate=_RATE, count=scale.growth_flows)
            world.wait_for_flows(held + scale.growth_flows)
            time.sleep(_SETTLE_S)
            return {"us": (cpu_s(world.agent) - before) / scale.growth_flows * _MICRO}

    return measure


def _tells(peers: int, sessions: int, scale: Scale) -> Callable[[], Result]:
    """What ap1's agent spends on each new flow of its own, with so many subscribers."""

    def measure() -> Result:
        with simulated(peers, sessions) as world:
            world.wait_for_flows(peers * sessions)
            world.command(do="subscribe", to=f"{world.lab.plan.underlay('ap1')}:7411")
            time.sleep(1.0)
            return {"us": _own_flows(world, scale) * _MICRO}

    return measure


def _own_flows(world: Simulated, scale: Scale) -> float:
    options = ("--flows", scale.growth_flows, "--rate", _RATE)
    with generating(world.lab, CLIENT, *options) as generator:
        before = cpu_s(world.agent)
        generator.start()
        generator.result()
        time.sleep(_SETTLE_S)
        return (cpu_s(world.agent) - before) / scale.growth_flows


def _chart(samples: Samples, what: str, sides: tuple[str, ...]) -> dict[str, str]:
    """CPU per flow over the number of peers, or of sessions."""
    lines = {
        side: [
            (float(case.split()[0].replace(",", "")), samples.median(case, side, "us"))
            for case in samples.cases()
            if samples.of(case, side)
        ]
        for side in sides
    }
    if not all(lines.values()):
        return {}
    title = f"CPU of an agent per new flow that it {' or '.join(sides)}"
    return {f"growth-{what}.svg": lines_chart(title, lines, what, "µs a flow")}


def _peer_rows(samples: Samples, scale: Scale) -> list[Row]:
    few, *more = [f"{peers} peers" for peers in scale.growth_peers]
    rows = []
    for many in more:
        number = many.split()[0]
        pairs = samples.across((many, few), "hears", "us")
        what = f"CPU per flow heard from one of {many}"
        rows += compared(f"growth.peers.{number}.hears", what, pairs, "µs", few, ratio_at_most=1.3)
        pairs = samples.across((many, few), "tells", "us")
        what = f"CPU per own flow told to {many}"
        rows += compared(f"growth.peers.{number}.tells", what, pairs, "µs", few)
    return rows


def _session_rows(samples: Samples, scale: Scale) -> list[Row]:
    few, *more = [f"{sessions:,} sessions" for sessions in scale.growth_sessions]
    return [
        row
        for many in more
        for row in compared(
            f"growth.sessions.{many.split()[0].replace(',', '')}",
            f"CPU per flow heard with {many} held",
            samples.across((many, few), "hears", "us"),
            "µs",
            few,
            ratio_at_most=1.3,
        )
    ]
