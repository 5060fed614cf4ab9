"""A lab in which one AP has simulated peers beside its real ones."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from ipaddress import IPv4Address
from typing import Any

from apagent.lab.errors import LabError
from apagent.lab.lab import Lab
from apagent.lab.place import Place
from apagent.lab.plan import FABRIC, UNDERLAY
from tests.bench.contenders import ANCHOR, prepare
from tests.bench.sets import MapSize
from tests.bench.simulate import peer_id

ADDRESS = UNDERLAY[250]
FIRST_PORT = 20_000
_FIRST_UNDERLAY = IPv4Address("10.98.0.1")
_STALLED_S = 20.0
_POLL_S = 0.02
_READY_S = 120.0


class Simulated:
    """The lab, the running program `tests.bench.simulate`, and the AP that follows it."""

    def __init__(self, lab: Lab, at: str, process: subprocess.Popen[str], flows: MapSize) -> None:
        self.lab = lab
        self.at = at
        self._process = process
        self.flows = flows

    @property
    def agent(self) -> int:
        """Process id of the AP's agent."""
        return self.lab.agent_pid(self.at)

    def command(self, **command: Any) -> None:
        """Have the simulated peers do something, and wait until it is done."""
        self.start(**command)
        self.finish()

    def start(self, **command: Any) -> None:
        """Have them begin with it."""
        if self._process.stdin is not None:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()

    def finish(self) -> None:
        """Wait until they are done."""
        if self._process.stdout is None or not self._process.stdout.readline():
            raise LabError("the simulated peers have ended")

    def wait_for_flows(self, wanted: int) -> float:
        """Wait until the AP's kernel has so many flows; the time when it did (CLOCK_MONOTONIC)."""
        last, changed = -1, time.monotonic()
        while (now := self.flows.read()) < wanted:
            if now != last:
                last, changed = now, time.monotonic()
            elif time.monotonic() - changed > _STALLED_S:
                raise LabError(f"{self.at} holds {now} of {wanted} flows only")
            time.sleep(_POLL_S)
        return time.monotonic()


@contextlib.contextmanager
def simulated(
    peers: int, sessions: int, aps: int = 1, at: str = ANCHOR, place: Place | None = None
) -> Iterator[Simulated]:
    """A lab with a client at ap1; the agent of `at` follows `peers` with `sessions` each."""
    with Lab(aps, 1, place=place) as lab, contextlib.ExitStack() as stack:
        prepare(lab)
        lab.kill_agent(at, signal.SIGTERM)
        lab.run(FABRIC, ["ip", "address", "add", f"{ADDRESS}/24", "dev", "backhaul"])
        process = stack.enter_context(_running(lab, peers, sessions))
        _configure(lab, at, peers)
        lab.agents.start(at)
        lab.agents.wait_ready([at], _READY_S)
        flows = stack.enter_context(contextlib.closing(MapSize(lab.namespace(at))))
        yield Simulated(lab, at, process, flows)


def _configure(lab: Lab, at: str, peers: int) -> None:
    """Add the simulated peers; their kernels, which aren't there, are not missed for a minute."""
    file = lab.agents.config_file(at)
    text = file.read_text(encoding="utf-8")
    text = text.replace("[peering]\n", "[peering]\ndead_after_s = 60\n")
    tables = "".join(
        f'[[peers]]\nid = "{peer_id(n)}"\naddress = "{ADDRESS}:{FIRST_PORT + n}"\n'
        f'underlay = "{_FIRST_UNDERLAY + n}"\n'
        for n in range(peers)
    )
    file.write_text(text + tables, encoding="utf-8")


@contextlib.contextmanager
def _running(lab: Lab, peers: int, sessions: int) -> Iterator[subprocess.Popen[str]]:
    options = ("--address", ADDRESS, "--port", FIRST_PORT, "--peers", peers, "--sessions", sessions)
    argv = [sys.executable, "-m", "tests.bench.simulate", *map(str, options)]
    pipe = subprocess.PIPE
    with lab.popen(FABRIC, argv, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            if process.stdout is None or not process.stdout.readline():
                raise LabError("the simulated peers ended before they were ready")
            yield process
        finally:
            process.kill()
