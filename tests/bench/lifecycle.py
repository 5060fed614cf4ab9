"""Restart, snapshot, memory, idleness: what an agent takes beside new flows."""

from __future__ import annotations

import contextlib
import re
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime

from apagent.lab.errors import LabError
from apagent.lab.lab import Lab
from tests.bench.contenders import ANCHOR, Apagent, Conntrackd, Contender, prepare
from tests.bench.cost import cpu_s, resident_bytes
from tests.bench.replication import open_flows
from tests.bench.rows import Row, alone, compared
from tests.bench.runner import Group, Result, Samples, Trial
from tests.bench.scale import Scale

_SETTLE_S = 2.0
_STALLED_S = 20.0
_MIB = 1 << 20
_PEER = "ap2"
_SUBSCRIBED = re.compile(r"^(\S+ \S+) .*peer 'ap2' subscribes", re.MULTILINE)
_IN_SYNC = re.compile(r"^(\S+ \S+) .*peer ap1: in-sync", re.MULTILINE)


def groups(scale: Scale) -> list[Group]:
    """A group for each, since they take long."""
    sessions = f"{scale.many_sessions:,} sessions"
    idle = f"{scale.idle_aps - 1} peers, {scale.idle_clients} clients"
    return [
        Group("restart", scale.rounds, [Trial(sessions, "apagent", _restart(scale))], _start_rows),
        Group(
            "memory",
            scale.few,
            [
                Trial(sessions, "apagent", _memory(Apagent, scale)),
                Trial(sessions, "conntrackd", _memory(Conntrackd, scale)),
            ],
            _memory_rows,
        ),
        Group("idle", 1, [Trial(idle, "apagent", _idle(scale))], _idle_rows),
    ]


def _restart(scale: Scale) -> Callable[[], Result]:
    """The anchor of many sessions restarts; then another AP starts that knows nothing."""

    def measure() -> Result:
        with Apagent(2) as world:
            open_flows(world, scale.many_sessions)
            lab = world.lab
            lab.kill_agent(ANCHOR, signal.SIGKILL)
            began = time.monotonic()
            lab.start_agent(ANCHOR)
            in_sync_s = time.monotonic() - began
            kept = world.replicated()
            return {"in_sync_s": in_sync_s, "kept": kept, "snapshot_s": _snapshot_s(world, scale)}

    return measure


def _snapshot_s(world: Apagent, scale: Scale) -> float:
    """From the subscription of an AP that knows nothing until all is in its kernel, by the logs."""
    lab = world.lab
    lab.kill_agent(_PEER, signal.SIGKILL)
    lab.run(_PEER, ["apagent", "cleanup", "--config", str(lab.agents.config_file(_PEER))])
    lab.start_agent(_PEER)
    deadline = time.monotonic() + _STALLED_S
    while world.replicated() < scale.many_sessions:
        if time.monotonic() > deadline:
            raise LabError(f"{world.replicated()} sessions came of {scale.many_sessions}")
        time.sleep(0.01)
    began = _logged(lab, ANCHOR, _SUBSCRIBED)
    return (_logged(lab, _PEER, _IN_SYNC) - began).total_seconds()


def _logged(lab: Lab, ap: str, pattern: re.Pattern[str]) -> datetime:
    """When a line was logged last."""
    *_, last = pattern.findall(lab.agents.log(ap).read_text(encoding="utf-8"))
    return datetime.strptime(last, "%Y-%m-%d %H:%M:%S,%f").replace(tzinfo=UTC)


def _memory(
    make: Callable[[], contextlib.AbstractContextManager[Contender]], scale: Scale
) -> Callable[[], Result]:
    def measure() -> Result:
        with make() as world:
            time.sleep(_SETTLE_S)
            pids = (world.sender, *world.receivers[:1])
            before = [resident_bytes(pid) for pid in pids]
            open_flows(world, scale.many_sessions)
            time.sleep(_SETTLE_S)
            after = [resident_bytes(pid) for pid in pids]
        grown = [(b - a) / scale.many_sessions for a, b in zip(before, after, strict=True)]
        return {"idle_mib": before[0] / _MIB, "own_bytes": grown[0], "peers_bytes": grown[1]}

    return measure


def _idle(scale: Scale) -> Callable[[], Result]:
    """Real agents on all APs, real clients, and nothing that happens."""

    def measure() -> Result:
        with Lab(scale.idle_aps, scale.idle_clients) as lab:
            prepare(lab)
            for number, client in enumerate(lab.clients):
                lab.roam(client, lab.aps[number % len(lab.aps)])
            time.sleep(scale.idle_settle_s)
            known = lab.apctl(ANCHOR, "status")
            before, began = cpu_s(lab.agent_pid(ANCHOR)), time.monotonic()
            time.sleep(scale.idle_s)
            used = cpu_s(lab.agent_pid(ANCHOR)) - before
            return {
                "percent": 100 * used / (time.monotonic() - began),
                "clients": known["clients_here"] + known["clients_elsewhere"],
            }

    return measure


def _start_rows(samples: Samples) -> list[Row]:
    rows = []
    for key, what, limit in (
        ("in_sync_s", "restart until in sync", 2.0),
        ("snapshot_s", "full snapshot to a new peer, until it is in its kernel", 1.0),
    ):
        for case in samples.cases():
            values = samples.values(case, "apagent", key)
            rows += alone(f"start.{key}", f"{what}, {case}", values, "s", at_most=limit)
    return rows


def _memory_rows(samples: Samples) -> list[Row]:
    rows = []
    for case in samples.cases():
        idle = samples.values(case, "apagent", "idle_mib")
        rows += alone("memory.idle", "resident memory, idle", idle, "MiB", at_most=64)
        for key, what in (
            ("own_bytes", "memory per own flow at its anchor"),
            ("peers_bytes", "memory per session at another AP"),
        ):
            pairs = [
                (float(ours[key]), float(theirs["own_bytes"]))
                for ours, theirs in zip(
                    samples.of(case, "apagent"), samples.of(case, "conntrackd"), strict=False
                )
            ]
            rows += compared(
                f"memory.{key}", f"{what}, {case}", pairs, "bytes", "conntrackd", ratio_at_most=0.5
            )
    return rows


def _idle_rows(samples: Samples) -> list[Row]:
    return [
        row
        for case in samples.cases()
        for row in alone(
            "idle.cpu",
            f"idle CPU, {case}",
            samples.values(case, "apagent", "percent"),
            "% of a core",
            at_most=1.0,
        )
    ]
