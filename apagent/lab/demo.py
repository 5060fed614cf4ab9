"""The demo: a client downloads a file while it roams, once without apagent and once with it."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise

from apagent import __version__
from apagent.lab.lab import Lab
from apagent.lab.measure import Arrivals, Echoes
from apagent.lab.outcome import BIN_NS, Outcome, Roam, Transfer
from apagent.lab.plan import SERVER_ADDRESS
from apagent.lab.traffic import DOWNLOAD_PORT
from apagent.lab.traffic.running import Event, Running, running, serving

Progress = Callable[[str], None]
FlowId = tuple[object, ...]

CLIENT = "client1"
SERVER = str(SERVER_ADDRESS)
PATH = ("ap1", "ap2", "ap3", "ap1", "ap2", "ap3")
"""The client's way; five roams over three APs."""
DWELL_S = 3.2
"""Time between two roams. Without apagent the client is back at the AP that it began at after
three of them, so two and the roam itself must take longer than `STALL_S`."""
STALL_S = 6.0
"""The download gives up after this silence."""
ASK_AFTER_S = 1.5
"""When, after a roam, the agent is asked for the client's flows: away from any roam, since asking
takes computing time from the traffic."""
_IN_FLIGHT_NS = 2_000_000
"""An echo that is lost by a roam may have been sent so long before it."""
_START_TIMEOUT_S = 10.0
_REPORT_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to transfer, in bytes."""

    size: int

    @property
    def rate_mbit(self) -> float:
        """The rate that makes the transfer last for all roams, and half a stay more."""
        return self.size * 8 / 1e6 / (DWELL_S * (len(PATH) - 0.5))


@dataclass(frozen=True, slots=True)
class _Step:
    """A roam as it was made, and the client's flows some time after it."""

    to_ap: str
    began_ns: int
    link_up_ns: int
    flows: dict[FlowId, str] | None
    """Anchor of each live flow; None: there is no agent to ask."""


def run(plan: Plan, progress: Progress) -> Outcome:
    """Run both transfers. Raises LabError and TrafficError."""
    began = time.monotonic()
    without = _transfer(plan, progress, agents=False)
    with_apagent = _transfer(plan, progress, agents=True)
    return Outcome(
        without=without,
        with_apagent=with_apagent,
        size=plan.size,
        rate_mbit=plan.rate_mbit,
        took_s=time.monotonic() - began,
        versions={
            "apagent": __version__,
            "kernel": platform.release(),
            "python": platform.python_version(),
            "pyroute2": version("pyroute2"),
        },
    )


def _transfer(plan: Plan, progress: Progress, *, agents: bool) -> Transfer:
    progress(f"{'with' if agents else 'without'} apagent")
    with ExitStack() as stack:
        lab = stack.enter_context(Lab(len(set(PATH)), 1, agents=agents, progress=progress))
        server = stack.enter_context(serving(lab))
        echo = stack.enter_context(
            running(lab, CLIENT, "echo", SERVER, "--duration-s", _longest_s())
        )
        echo.wait_for("started", _START_TIMEOUT_S)
        options = ("--size", plan.size, "--rate-mbit", plan.rate_mbit, "--stall-s", STALL_S)
        download = stack.enter_context(running(lab, CLIENT, "download", SERVER, *options))
        started_ns = download.wait_for("connected", _START_TIMEOUT_S)["time_ns"]
        steps = _roam_along(lab, download, started_ns, progress)
        result = download.result(_longest_s())
        progress(_ending(result))
        echo.stop()
        echo.result(_REPORT_TIMEOUT_S)
    return _summed_up(steps, result, download.events, echo.events, server.events)


def _longest_s() -> float:
    return DWELL_S * len(PATH) + 2 * STALL_S


def _roam_along(lab: Lab, download: Running, started_ns: int, progress: Progress) -> list[_Step]:
    """Roam along `PATH` until the end of the download; the first step is no roam but the start."""
    steps = [_step(lab, PATH[0], started_ns, started_ns, download)]
    for number, (here, there) in enumerate(pairwise(PATH), start=1):
        if _wait_until(download, started_ns + int(number * DWELL_S * 1e9)):
            break
        progress(f"{_received(download) / 1e6:5.1f} MB received, roam {here} -> {there}")
        began_ns = time.monotonic_ns()
        steps.append(_step(lab, there, began_ns, lab.roam(CLIENT, there), download))
    return steps


def _step(lab: Lab, ap: str, began_ns: int, link_up_ns: int, download: Running) -> _Step:
    flows = None
    if lab.has_agents and not _wait_until(download, link_up_ns + int(ASK_AFTER_S * 1e9)):
        flows = _flows(lab, ap)
    return _Step(ap, began_ns, link_up_ns, flows)


def _wait_until(download: Running, time_ns: int) -> bool:
    """Wait for a time or the end of the download; whether it is the end."""
    return download.wait_ended((time_ns - time.monotonic_ns()) / 1e9)


def _flows(lab: Lab, ap: str) -> dict[FlowId, str]:
    client = str(lab.plan.station(CLIENT).address)
    keys = ("protocol", "client_port", "remote", "remote_port")
    return {
        tuple(flow[key] for key in keys): flow["anchor"]
        for flow in lab.apctl(ap, "flows", "--client", client)
    }


def _received(download: Running) -> int:
    return sum(Arrivals.of(download.events).sizes)


def _ending(result: Event) -> str:
    if result["completed"]:
        return "the download is complete"
    return f"the download gave up after {result['bytes'] / 1e6:.1f} MB: {result['reason']}"


def _summed_up(
    steps: list[_Step],
    result: Event,
    download: list[Event],
    echo: list[Event],
    server: list[Event],
) -> Transfer:
    arrivals, echoes = Arrivals.of(download), Echoes.of(echo)
    started_ns = steps[0].link_up_ns
    ends = [*(step.began_ns for step in steps[2:]), result["ended_ns"]]
    return Transfer(
        completed=result["completed"],
        reason=result["reason"],
        bytes=result["bytes"],
        sha256_match=result["sha256_match"],
        source_addresses=_sources(server),
        roams=tuple(
            _roam(before, after, end_ns, arrivals, echoes, started_ns)
            for (before, after), end_ns in zip(pairwise(steps), ends, strict=True)
        ),
        duration_s=(result["ended_ns"] - started_ns) / 1e9,
        rates_mbit=tuple(arrivals.rates_mbit(started_ns, result["ended_ns"], BIN_NS)),
    )


def _sources(server: Iterable[Event]) -> tuple[str, ...]:
    """The client's addresses as the server saw them, the first one first."""
    return tuple(dict.fromkeys(e["address"] for e in server if e["event"] == "peer"))


def _roam(
    before: _Step, after: _Step, end_ns: int, arrivals: Arrivals, echoes: Echoes, started_ns: int
) -> Roam:
    kept = None
    if before.flows is not None and after.flows is not None:
        kept = len(before.flows.keys() & after.flows.keys())
    return Roam(
        from_ap=before.to_ap,
        to_ap=after.to_ap,
        time_ms=(after.link_up_ns - started_ns) / 1e6,
        interruption_ms=_ms(arrivals.interruption_ns(after.link_up_ns)),
        silence_ms=arrivals.longest_silence_ns(after.began_ns, end_ns) / 1e6,
        echo_interruption_ms=_ms(echoes.interruption_ns(after.link_up_ns)),
        echoes_lost=echoes.lost(after.began_ns - _IN_FLIGHT_NS, end_ns - _IN_FLIGHT_NS),
        flows=None if before.flows is None else len(before.flows),
        flows_kept=kept,
        anchor=_download_anchor(after.flows),
    )


def _download_anchor(flows: dict[FlowId, str] | None) -> str | None:
    for (protocol, _, _, port), anchor in (flows or {}).items():
        if (protocol, port) == ("tcp", DOWNLOAD_PORT):
            return anchor
    return None


def _ms(time_ns: int | None) -> float | None:
    return None if time_ns is None else time_ns / 1e6
