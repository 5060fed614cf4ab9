"""How long a roam interrupts a client: a 1 kHz UDP echo from the moment its link is up again.

Every case has a number of flows that the client holds, and says whether the client's carrier drops
at a roam. Writes OUTPUT/roam.json and OUTPUT/roam.svg.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import cycle, islice, pairwise
from pathlib import Path

from apagent.lab import namespaces
from apagent.lab.lab import Lab
from apagent.lab.measure import Echoes
from apagent.lab.plan import SERVER_ADDRESS
from apagent.lab.traffic.running import running, serving
from tests.bench.distribution import cumulative_chart, percentile

BUDGET_LOST, BUDGET_GAP_MS = 2, 5.0
CLIENT = "client1"
SERVER = str(SERVER_ADDRESS)
ROUND = ("ap2", "ap3", "ap1")
RATE = 1000
_FIRST_PORT, _PORTS_A_SOCKET, _BURST = 20_000, 100, 500
_UDP_TIMEOUT_S = 3600
_SETTLE_S = 1.0
_PATIENCE_S = 60.0
_PRIORITY = 5
_BEFORE_NS = 20_000_000
"""A request that was sent so long before a roam may still be lost by it, if the machine is busy."""


Mover = Callable[[str], int]
"""Moves the client to an AP; returns when its link was up there (CLOCK_MONOTONIC, ns)."""


@dataclass(frozen=True, slots=True)
class Roam:
    """One roam: milliseconds from link up to the first echo, and the requests without an answer."""

    gap_ms: float
    lost: int
    """Sent after link up."""
    lost_in_all: int
    """Also those under way when the roam began, and those sent while the carrier was down."""


@dataclass(frozen=True, slots=True)
class Case:
    """All roams of one kind, summed up."""

    flows: int
    carrier: bool
    runs: int
    lost_p50: float
    lost_p99: float
    lost_max: float
    gap_ms_p50: float
    gap_ms_p99: float
    gap_ms_max: float
    lost_in_all_p50: float
    lost_in_all_p99: float
    gaps_ms: list[float]

    @classmethod
    def of(cls, flows: int, roams: list[Roam], *, carrier: bool) -> Case:
        """Sum up `roams`."""
        gaps = [round(roam.gap_ms, 3) for roam in roams]
        lost = [roam.lost for roam in roams]
        in_all = [roam.lost_in_all for roam in roams]
        return cls(
            flows,
            carrier,
            len(roams),
            lost_p50=percentile(lost, 50),
            lost_p99=percentile(lost, 99),
            lost_max=max(lost),
            gap_ms_p50=percentile(gaps, 50),
            gap_ms_p99=percentile(gaps, 99),
            gap_ms_max=max(gaps),
            lost_in_all_p50=percentile(in_all, 50),
            lost_in_all_p99=percentile(in_all, 99),
            gaps_ms=gaps,
        )

    @property
    def name(self) -> str:
        """The case in words."""
        flows = "1 flow" if self.flows == 1 else f"{self.flows:,} flows"
        return f"{flows}, carrier {'drops' if self.carrier else 'stays'}"

    @property
    def holds(self) -> bool:
        """Whether it keeps the budget."""
        return self.lost_p99 <= BUDGET_LOST and self.gap_ms_p99 <= BUDGET_GAP_MS


def main(argv: list[str] | None = None) -> int:
    """Run it; 0: every case keeps the budget, 1: one doesn't."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--runs", type=int, default=200, help="roams in each case")
    made.add_argument("--flows", type=int, nargs="+", default=[1, 10_000])
    made.add_argument("--dwell-ms", type=float, default=100.0, help="between two roams")
    made.add_argument("--output", type=Path, default=Path("bench-out"))
    made.add_argument(
        "--realtime",
        action="store_true",
        help="run everything at real-time priority (root only), for a machine with other work",
    )
    options = made.parse_args(argv)
    if options.realtime:
        # What is started from here on inherits it.
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(_PRIORITY))
    load = os.getloadavg()[0]
    cases = [
        case
        for flows in options.flows
        for case in measure(flows, options.runs, options.dwell_ms / 1000)
    ]
    machine = {"kernel": platform.release(), "processors": os.cpu_count(), "load_before": load}
    _write(options.output, {**machine, "realtime": options.realtime}, cases)
    return 0 if all(case.holds for case in cases) else 1


def measure(flows: int, runs: int, dwell_s: float) -> Iterator[Case]:
    """Both cases, carrier stays and carrier drops, with a client of `flows` flows."""
    with Lab(3, 1, progress=_say) as lab, contextlib.ExitStack() as stack:
        _keep_flows(lab)
        stack.enter_context(serving(lab))
        open_flows(lab, flows - 1)
        for carrier in (False, True):
            case = Case.of(flows, roams(lab, runs, dwell_s, carrier=carrier), carrier=carrier)
            _say(_describe(case))
            yield case


def roams(
    lab: Lab, runs: int, dwell_s: float, *, carrier: bool, mover: Mover | None = None
) -> list[Roam]:
    """Roam round the APs `runs` times, with the echo running, which is one more flow.

    `mover` moves the client; by default the lab does, and the agents do the rest.
    """
    move = mover or (lambda ap: lab.roam(CLIENT, ap, carrier=carrier))
    steps: list[tuple[int, int]] = []
    longest_s = (runs + 20) * (dwell_s + 0.2) + _PATIENCE_S
    with running(lab, CLIENT, "echo", SERVER, "--rate", RATE, "--duration-s", longest_s) as echo:
        echo.wait_for("started", 10.0)
        time.sleep(_SETTLE_S)
        for number, ap in enumerate(islice(cycle(ROUND), runs), start=1):
            began = time.monotonic_ns()
            steps.append((began, move(ap)))
            time.sleep(dwell_s)
            if number % 50 == 0:
                _say(f"{number} of {runs} roams")
        time.sleep(_SETTLE_S)
        echo.stop()
        echo.result(_PATIENCE_S)
    ends = [*(began for began, _ in steps[1:]), time.monotonic_ns()]
    echoes = Echoes.of(echo.events)
    return [_roam(echoes, *step, end) for step, end in zip(steps, ends, strict=True)]


def _roam(echoes: Echoes, began_ns: int, link_up_ns: int, end_ns: int) -> Roam:
    gap_ns = echoes.interruption_ns(link_up_ns)
    until_ns = end_ns - _BEFORE_NS
    return Roam(
        gap_ms=(end_ns - link_up_ns if gap_ns is None else gap_ns) / 1e6,
        lost=echoes.lost(link_up_ns, until_ns),
        lost_in_all=echoes.lost(began_ns - _BEFORE_NS, until_ns),
    )


def open_flows(lab: Lab, count: int) -> None:
    """Open UDP flows at ap1 and wait until every AP knows and holds them."""
    with contextlib.ExitStack() as stack:
        for first in range(0, count, _PORTS_A_SOCKET):
            with namespaces.inside(lab.namespace(CLIENT)):
                udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            for port in range(min(_PORTS_A_SOCKET, count - first)):
                with contextlib.suppress(ConnectionRefusedError):
                    udp.sendto(b"hello", (SERVER, _FIRST_PORT + port))
            if (first + _PORTS_A_SOCKET) % _BURST == 0:
                time.sleep(0.02)
    deadline = time.monotonic() + _PATIENCE_S
    while (known := _fewest_known(lab)) < count:
        if time.monotonic() > deadline:
            sys.exit(f"an AP knows {known} of {count} flows only")
    if count:
        _say(f"{count} flows are open and known to every AP")


def _fewest_known(lab: Lab) -> int:
    answers = [lab.apctl(ap, "status") for ap in lab.aps]
    return min(int(answer["own_sessions"] + answer["peer_sessions"]) for answer in answers)


def _keep_flows(lab: Lab) -> None:
    for ap in lab.aps:
        with namespaces.inside(lab.namespace(ap)):
            namespaces.set_sysctl("netfilter/nf_conntrack_udp_timeout", _UDP_TIMEOUT_S)


def _describe(case: Case) -> str:
    bounds = (0.0, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, float("inf"))
    counts = [
        f"{low:g}-{high:g} ms: {count}"
        for low, high in pairwise(bounds)
        if (count := sum(low <= gap < high for gap in case.gaps_ms))
    ]
    verdict = "keeps the budget" if case.holds else "MISSES THE BUDGET"
    return (
        f"{case.name}: lost p50 {case.lost_p50:g}, p99 {case.lost_p99:g}, max {case.lost_max:g}; "
        f"first echo after p50 {case.gap_ms_p50:.1f} ms, p99 {case.gap_ms_p99:.1f} ms, "
        f"max {case.gap_ms_max:.1f} ms; {verdict}\n    {', '.join(counts)}"
    )


def _write(directory: Path, machine: dict[str, object], cases: list[Case]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    report = {**machine, "cases": [asdict(case) for case in cases]}
    (directory / "roam.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    chart = cumulative_chart(
        "Time from link up at the new AP to the first echo",
        {case.name: case.gaps_ms for case in cases},
        BUDGET_GAP_MS,
    )
    (directory / "roam.svg").write_text(chart, encoding="utf-8")
    _say(f"wrote {directory / 'roam.json'} and {directory / 'roam.svg'}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - a measurement talks


if __name__ == "__main__":
    sys.exit(main())
