"""What forwarding costs: a flow that has roamed, and flows that never do.

Both labs of a comparison are up at once and take turns, a fraction of a second each.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import Any

from apagent.lab import namespaces
from apagent.lab.errors import LabError
from apagent.lab.lab import Lab
from apagent.lab.place import Place
from apagent.lab.plan import FABRIC, GATEWAY_MAC, INTERNET, RADIO, SERVER, SERVER_ADDRESS
from tests.bench import static
from tests.bench.contenders import CLIENT, prepare
from tests.bench.load import REMOTE_PORT
from tests.bench.rows import Row, compared
from tests.bench.runner import Group, Result, Samples, Trial
from tests.bench.scale import Scale
from tests.bench.simulated import simulated

_SETTLE_S = 1.0
_ANSWER_S = 5.0
_ROAM_AT_S, _COUNT_FROM_S = 1.0, 2.0
_MEGA, _NANO = 1e6, 1e9
_ANY_RULE = "fwmark 0x100/0x100 lookup main priority 1000"
"""No packet has this mark."""


def groups(scale: Scale) -> list[Group]:
    """Roamed flows with few and many sessions, and flows that stay."""
    roamed = [
        Trial(f"{sessions:,} sessions", "both", _roamed(sessions, scale))
        for sessions in scale.path_sessions
    ]
    return [
        Group("path-roamed", 1, roamed, lambda samples: _roamed_rows(samples, scale)),
        Group("path-stays", scale.few, [Trial("one flow", "both", _stays(scale))], _stays_rows),
    ]


class Blaster:
    """The running program `tests.bench.blast`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def send(self, packets: int) -> dict[str, Any]:
        """Send so many packets; what they have cost."""
        if self._process.stdin is not None:
            self._process.stdin.write(f"{packets}\n")
            self._process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next thing that it says. Raises LabError."""
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise LabError("the program that sends packets has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextlib.contextmanager
def blasting(lab: Lab, node: str, interface: str) -> Iterator[Blaster]:
    """Run it in a node of the lab for the length of the block, sending in the client's name."""
    station = lab.plan.station(CLIENT)
    options = ("--interface", interface, "--mac", station.mac, "--address", station.address)
    argv = [sys.executable, "-m", "tests.bench.blast", *map(str, options), "--gateway", GATEWAY_MAC]
    pipe = subprocess.PIPE
    with lab.popen(node, argv, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            blaster = Blaster(process)
            blaster.answer()
            yield blaster
        finally:
            process.kill()


def _roamed(sessions: int, scale: Scale) -> Callable[[], Result]:
    """A flow through the tunnel: by apagent with so many sessions at ap2, and by a static route."""

    def measure() -> Result:
        with (
            simulated(1, sessions, aps=2, at="ap2", place=_place("a")) as world,
            Lab(2, 1, agents=False, place=_place("b")) as plain,
        ):
            world.wait_for_flows(sessions)
            prepare(plain)
            static.connect(plain)
            plain.roam(CLIENT, "ap2")
            with (
                blasting(world.lab, CLIENT, RADIO) as one,
                blasting(plain, CLIENT, RADIO) as other,
            ):
                establish(world.lab, one)
                establish(plain, other)
                world.wait_for_flows(sessions + 1)
                world.lab.roam(CLIENT, "ap2")
                time.sleep(_SETTLE_S)
                with swallowed(world.lab), swallowed(plain):
                    costs = _take_turns({"ours": one, "plain": other}, scale)
            return {**costs, **_throughput(world.lab, plain, scale)}

    return measure


def _stays(scale: Scale) -> Callable[[], Result]:
    """A flow that stays where it was opened: with apagent, and with plain masquerading.

    And with plain masquerading where there is any policy rule, as with mwan3, pbr or a VPN.
    """

    def measure() -> Result:
        with (
            Lab(2, 1, place=_place("a")) as ours,
            Lab(2, 1, agents=False, place=_place("b")) as plain,
            Lab(2, 1, agents=False, place=_place("c")) as ruled,
        ):
            ruled.run("ap1", ["ip", "rule", "add", *_ANY_RULE.split()])
            labs = {"ours": ours, "plain": plain, "ruled": ruled}
            with contextlib.ExitStack() as stack:
                blasters: dict[str, Blaster] = {}
                for name, lab in labs.items():
                    prepare(lab)
                    radio = lab.plan.antenna("ap1").name
                    blasters[name] = stack.enter_context(blasting(lab, FABRIC, radio))
                    establish(lab, blasters[name])
                    stack.enter_context(swallowed(lab))
                return _take_turns(blasters, scale)

    return measure


def establish(lab: Lab, blaster: Blaster) -> None:
    """Open the flow and have the server answer it once, so that it is established."""
    with namespaces.inside(lab.namespace(SERVER)):
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with server:
        server.settimeout(_ANSWER_S)
        server.bind((str(SERVER_ADDRESS), REMOTE_PORT))
        blaster.send(1)
        _, sender = server.recvfrom(1 << 16)
        server.sendto(b"answer", sender)


@contextlib.contextmanager
def swallowed(lab: Lab) -> Iterator[None]:
    """Let what is for the server vanish at its router, so that only the way there counts."""
    route = ["blackhole", f"{SERVER_ADDRESS}/32"]
    lab.run(INTERNET, ["ip", "route", "add", *route])
    try:
        yield
    finally:
        lab.run(INTERNET, ["ip", "route", "del", *route])


def _take_turns(blasters: Mapping[str, Blaster], scale: Scale) -> dict[str, Any]:
    """CPU time per packet of each in nanoseconds, and packets a second."""
    for blaster in blasters.values():
        blaster.send(scale.turn_packets)
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in blasters}
    for _ in range(scale.turns):
        for name, blaster in blasters.items():
            turns[name].append(blaster.send(scale.turn_packets))
    costs = {f"{n}_ns": median(map(_cost_ns, sent)) for n, sent in turns.items()}
    rates = {
        f"{n}_pps": median(one["packets"] / one["took_s"] for one in sent)
        for n, sent in turns.items()
    }
    return {**costs, **rates, "turns_ns": {n: [*map(_cost_ns, s)] for n, s in turns.items()}}


def _cost_ns(sent: dict[str, Any]) -> float:
    cost: float = sent["cpu_s"] / sent["packets"] * _NANO
    return cost


def _throughput(ours: Lab, plain: Lab, scale: Scale) -> dict[str, Any]:
    """TCP throughput in Mbit/s of flows that began at ap1, after the roam to ap2."""
    with _iperf_server(ours), _iperf_server(plain):
        pairs = [
            (_roaming_iperf(ours, scale), _roaming_iperf(plain, scale))
            for _ in range(scale.iperf_runs)
        ]
    return {
        "ours_mbit": median(pair[0] for pair in pairs),
        "plain_mbit": median(pair[1] for pair in pairs),
        "mbit": pairs,
    }


def _roaming_iperf(lab: Lab, scale: Scale) -> float:
    """With agents the client roams while iperf3 runs; the static path is at ap2 throughout."""
    if lab.has_agents:
        lab.roam(CLIENT, "ap1")
        time.sleep(_SETTLE_S)
    seconds = _COUNT_FROM_S + scale.iperf_s
    argv = ["iperf3", "-c", str(SERVER_ADDRESS), "-t", f"{seconds:g}", "-J"]
    with lab.popen(CLIENT, argv, stdout=subprocess.PIPE, text=True) as process:
        time.sleep(_ROAM_AT_S)
        if lab.has_agents:
            lab.roam(CLIENT, "ap2")
        output, _ = process.communicate(timeout=seconds + 20)
    intervals = [one["sum"] for one in json.loads(output).get("intervals", ())]
    counted = [one for one in intervals if one["start"] >= _COUNT_FROM_S - 0.01]
    if not counted:
        raise LabError(f"iperf3 gave no result: {output[-300:]}")
    rates: list[float] = [one["bits_per_second"] for one in counted]
    return sum(rates) / len(rates) / _MEGA


@contextlib.contextmanager
def _iperf_server(lab: Lab) -> Iterator[None]:
    with lab.popen(
        SERVER, ["iperf3", "-s"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        time.sleep(_SETTLE_S)
        try:
            yield
        finally:
            process.kill()


def _place(suffix: str) -> Place:
    """Two labs at once need two places."""
    base = Place.from_environment(os.environ).prefix.rstrip("-")
    return Place.of(f"{base}{suffix}-")


def _roamed_rows(samples: Samples, scale: Scale) -> list[Row]:
    rows = []
    against = "a static VXLAN route"
    for sessions in scale.path_sessions:
        case = f"{sessions:,} sessions"
        held = "1 session" if sessions == 1 else case
        for key, unit, what in (
            ("pps", "packets/s", "packets per second of a roamed flow"),
            ("mbit", "Mbit/s", "TCP throughput of a roamed flow"),
        ):
            rows += compared(
                f"path.roamed.{key}.{sessions}",
                f"{what}, {held} in the map",
                [(one[f"ours_{key}"], one[f"plain_{key}"]) for one in samples.of(case, "both")],
                unit,
                against,
                ratio_at_least=0.97,
            )
        pairs = [(one["ours_ns"], one["plain_ns"]) for one in samples.of(case, "both")]
        what = f"CPU per packet of a roamed flow, whole path, {held} in the map"
        rows += compared(f"path.roamed.cpu.{sessions}", what, pairs, "ns", against)
    return rows


def _stays_rows(samples: Samples) -> list[Row]:
    found = samples.of("one flow", "both")
    plain = "plain masquerading"
    ours = compared(
        "path.stays.cpu",
        "CPU per packet of a flow that never roamed, radio to uplink",
        [(one["ours_ns"], one["plain_ns"]) for one in found],
        "ns",
        plain,
        ratio_at_most=1.03,
    )
    what = "CPU per packet of plain masquerading on an AP that has one policy rule"
    ruled = [(one["ruled_ns"], one["plain_ns"]) for one in found if "ruled_ns" in one]
    return [*ours, *compared("path.stays.ruled", what, ruled, "ns", plain)]
