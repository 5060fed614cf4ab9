"""What an anchor's death and its drain cost flows that move, with few and with many of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from apagent.lab.faults import Faults
from apagent.lab.measure import Arrivals, Echoes
from apagent.lab.plan import SERVER_ADDRESS
from apagent.lab.traffic.running import running, serving
from tests.bench.contenders import ANCHOR, CLIENT, Apagent
from tests.bench.replication import open_flows
from tests.bench.rows import Row, alone
from tests.bench.runner import Group, Result, Samples, Trial
from tests.bench.scale import Scale
from tests.bench.waiting import until

_SERVING = "ap3"
"""Another one than the anchor and its heir."""
_DRAIN, _DEATH = "drain", "loss of power"
_FOR_S = 120
_AFTER_S = 3.0
"""Of quiet, before and after."""
_START_S, _OPENED_S = 10.0, 0.5
_STALL_S = 60
_MS = 1e6


def groups(scale: Scale) -> list[Group]:
    """One group; each move in a lab of its own."""
    trials = [
        Trial(_case(flows), side, partial(_measure, flows, move))
        for flows in scale.moved_flows
        for side, move in ((_DEATH, _power_off), (_DRAIN, _drained))
    ]
    return [Group("succession", scale.few, trials, _rows)]


def _case(flows: int) -> str:
    return f"{flows:,} flows"


def _measure(flows: int, move: Callable[[Apagent], int]) -> Result:
    """A 1 kHz echo and a download, among flows that just are there."""
    server = str(SERVER_ADDRESS)
    with Apagent(3, takeover=True) as world, serving(world.lab):
        open_flows(world, flows)
        with (
            running(world.lab, CLIENT, "echo", server, "--duration-s", _FOR_S) as echo,
            running(
                world.lab, CLIENT, "download", server, "--size", 10**9, "--rate-mbit", 20,
                "--stall-s", _STALL_S,
            ) as download,
        ):  # fmt: skip
            echo.wait_for("started", _START_S)
            download.wait_for("connected", _START_S)
            time.sleep(_OPENED_S)
            world.lab.roam(CLIENT, _SERVING)
            time.sleep(_AFTER_S)
            began_ns = move(world)
            moved_ns = time.monotonic_ns()
            until(lambda: _heir_has_all(world, flows), "the successor anchors the flows")
            time.sleep(_AFTER_S)
            ended_ns = time.monotonic_ns()
            for program in (echo, download):
                program.stop()
                program.wait_ended(_START_S)
    echoes, arrivals = Echoes.of(echo.events), Arrivals.of(download.events)
    answers = tuple(sorted(at for at in echoes.received_ns if at is not None))
    answered = Arrivals(answers, (1,) * len(answers))
    return {
        "took_s": (moved_ns - began_ns) / 1e9,
        "echoes_lost": echoes.lost(began_ns, ended_ns),
        "echo_silence_ms": answered.longest_silence_ns(began_ns, ended_ns) / _MS,
        "tcp_silence_ms": arrivals.longest_silence_ns(began_ns, ended_ns) / _MS,
    }


def _heir_has_all(world: Apagent, flows: int) -> bool:
    others = (ap for ap in world.lab.aps if ap != ANCHOR)
    return max(int(world.lab.apctl(ap, "status")["own_sessions"]) for ap in others) >= flows


def _power_off(world: Apagent) -> int:
    return Faults(world.lab).power_off(ANCHOR)


def _drained(world: Apagent) -> int:
    began_ns = time.monotonic_ns()
    world.lab.run(ANCHOR, ["apctl", "drain", ANCHOR, "--wait", "--timeout", str(_FOR_S)])
    return began_ns


def _rows(samples: Samples) -> list[Row]:
    rows = []
    for case in samples.cases():
        dead = partial(samples.values, case, _DEATH)
        drained = partial(samples.values, case, _DRAIN)
        name = case.partition(" ")[0].replace(",", "")
        rows += [
            *alone(
                f"succession.{name}.echo",
                f"silence of an echo, from its anchor's loss of power on, {case}",
                dead("echo_silence_ms"),
                "ms",
                at_most=1000,
            ),
            *alone(
                f"succession.{name}.tcp",
                f"silence of a download, from its anchor's loss of power on, {case}",
                dead("tcp_silence_ms"),
                "ms",
            ),
            *alone(
                f"drain.{name}.lost",
                f"echoes lost by a drain, 1 kHz, {case}",
                drained("echoes_lost"),
                "echoes",
                at_most=2,
            ),
            *alone(
                f"drain.{name}.tcp",
                f"longest silence of a download in a drain, {case}",
                drained("tcp_silence_ms"),
                "ms",
            ),
            *alone(
                f"drain.{name}.took",
                f"a drain until the AP may be switched off, {case}",
                drained("took_s"),
                "s",
            ),
        ]
    return rows
