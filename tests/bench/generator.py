"""The load generator as seen by a measurement: prepared, started, asked how it went."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from apagent.lab.errors import LabError
from apagent.lab.lab import Lab
from apagent.lab.plan import GATEWAY_MAC


class Generator:
    """The running program `tests.bench.load`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def start(self) -> None:
        """Let it send."""
        if self._process.stdin is not None:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()

    def result(self) -> dict[str, Any]:
        """When it sent, and how much; waits for the end. Raises LabError."""
        return self._event("result")

    def wait_ready(self) -> None:
        """Wait until its frames are prepared. Raises LabError."""
        self._event("ready")

    def _event(self, name: str) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        event: dict[str, Any] = json.loads(line) if line else {"event": "end"}
        if event["event"] != name:
            raise LabError(f"the load generator ended before it was at {name!r}")
        return event


@contextlib.contextmanager
def generating(lab: Lab, client: str, *options: object) -> Iterator[Generator]:
    """Run it in a client's namespace for the length of the block; its frames are prepared."""
    station = lab.plan.station(client)
    where = ("--mac", station.mac, "--gateway", GATEWAY_MAC, "--address", station.address)
    argv = [sys.executable, "-m", "tests.bench.load", *map(str, (*where, *options))]
    pipe = subprocess.PIPE
    with lab.popen(client, argv, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            generator = Generator(process)
            generator.wait_ready()
            yield generator
        finally:
            process.kill()
