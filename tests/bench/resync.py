"""How soon a restarted agent is in sync again, with a full table of its own and of a peer."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from apagent.lab.lab import Lab
from tests.bench.contenders import prepare
from tests.bench.cost import cpu_s
from tests.bench.generator import generating
from tests.bench.rows import Row, alone
from tests.bench.runner import Group, Result, Samples, Trial
from tests.bench.scale import Scale
from tests.bench.waiting import until

_AP, _OTHER = "ap1", "ap2"
_SIDE = "apagent"
_RATE = 8000
_DOWN_S = 1.0
_LIMIT_S = 2.0


def groups(scale: Scale) -> list[Group]:
    """One group, one case."""
    flows = scale.most_flows // 2
    trial = Trial(_case(flows), _SIDE, partial(_measure, flows))
    return [Group("resync", scale.few, [trial], partial(_rows, flows))]


def _case(flows: int) -> str:
    return f"{flows:,} own sessions and {flows:,} of a peer"


def _measure(flows: int) -> Result:
    with Lab(aps=3, clients=2) as lab:
        prepare(lab)
        for client in lab.clients:
            options = ("--flows", flows, "--rate", _RATE)
            with generating(lab, client, *options) as generator:
                generator.start()
                generator.result()
        until(lambda: all(_sessions(lab, ap) >= 2 * flows for ap in lab.aps), "all know all flows")
        before = _feed(lab)
        lab.kill_agent(_AP)
        time.sleep(_DOWN_S)
        return _restart(lab, before)


def _restart(lab: Lab, before: dict[str, Any]) -> Result:
    began = time.monotonic()
    lab.start_agent(_AP)
    ready = time.monotonic()
    cpu = cpu_s(lab.agent_pid(_AP))
    until(lambda: _feed(lab)["state"] == "in-sync", f"{_OTHER} is in sync with {_AP}")
    followed = time.monotonic()
    until(lambda: _feed(lab)["checksum"] == lab.apctl(_AP, "status")["checksum"], "tables equal")
    travelled = _feed(lab)["changes_received"] - before["changes_received"]
    return {
        "ready_s": ready - began,
        "peer_in_sync_s": followed - began,
        "cpu_s": cpu,
        "travelled": travelled,
    }


def _sessions(lab: Lab, ap: str) -> int:
    status = lab.apctl(ap, "status")
    return int(status["own_sessions"] + status["peer_sessions"])


def _feed(lab: Lab) -> dict[str, Any]:
    """What the other AP says of the one that restarts."""
    found: list[dict[str, Any]] = lab.apctl(_OTHER, "peers")
    return next(peer for peer in found if peer["id"] == _AP)


def _rows(flows: int, samples: Samples) -> list[Row]:
    case = _case(flows)
    values = partial(samples.values, case, _SIDE)
    return [
        *alone(
            "resync.ready",
            f"start of an agent until it is in sync, {case}",
            values("ready_s"),
            "s",
            at_most=_LIMIT_S,
        ),
        *alone("resync.cpu", f"CPU of that start, {case}", values("cpu_s"), "s"),
        *alone(
            "resync.peer",
            f"start of an agent until a peer is in sync with it, {case}",
            values("peer_in_sync_s"),
            "s",
        ),
        *alone(
            "resync.travelled",
            f"sessions that travel to a peer of a restarted agent, {case}",
            values("travelled"),
            "sessions",
        ),
    ]
