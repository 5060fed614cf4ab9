"""What agents and kernels take, watched while a run goes on."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apagent.errors import ApagentError
from apagent.lab.lab import Lab

_EVERY_S = 1.0
WARM_S = 8.0
"""Of an agent's life, until what it takes is taken as its beginning."""
GROWTH_KIB, GROWTH_FILES = 16 * 1024, 40
"""How much more an agent may take at its end."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What an agent takes at a moment (CLOCK_MONOTONIC, s)."""

    at: float
    resident_kib: int
    files: int


class Watch:
    """Samples of every agent that ran, by AP and process id."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._ended = threading.Event()
        self.samples: dict[tuple[str, int], list[Sample]] = {}

    def run(self) -> None:
        """Take samples until `stop`."""
        while not self._ended.wait(_EVERY_S):
            for ap in self._lab.aps:
                with contextlib.suppress(ApagentError, OSError, StopIteration):
                    pid = self._lab.agent_pid(ap)
                    self.samples.setdefault((ap, pid), []).append(_sample(pid))

    def stop(self) -> None:
        """No more."""
        self._ended.set()

    def report(self) -> list[dict[str, Any]]:
        """Begin and end of each agent that has lived long enough."""
        return [
            {
                "ap": ap,
                "pid": pid,
                "seconds": round(last.at - samples[0].at, 1),
                "resident_kib": [first.resident_kib, last.resident_kib],
                "files": [first.files, last.files],
            }
            for (ap, pid), samples in self.samples.items()
            for first in [next((s for s in samples if s.at >= samples[0].at + WARM_S), None)]
            for last in [samples[-1]]
            if first is not None
        ]

    def growths(self) -> list[str]:
        """Agents that have grown by too much."""
        return [
            f"the agent of {one['ap']} (process {one['pid']}) has grown in {one['seconds']} s: "
            f"{one['resident_kib']} KiB, {one['files']} open files"
            for one in self.report()
            if one["resident_kib"][1] - one["resident_kib"][0] > GROWTH_KIB
            or one["files"][1] - one["files"][0] > GROWTH_FILES
        ]


def _sample(pid: int) -> Sample:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return Sample(time.monotonic(), int(line.split()[1]), files)


@contextlib.contextmanager
def watching(lab: Lab) -> Iterator[Watch]:
    """Watch for the length of the block."""
    watch = Watch(lab)
    thread = threading.Thread(target=watch.run, name="watch")
    thread.start()
    try:
        yield watch
    finally:
        watch.stop()
        thread.join()


def kernel_figures(lab: Lab) -> dict[str, dict[str, int]]:
    """What each AP's kernel holds, and what it has counted for us."""
    figures = {}
    for ap in lab.aps:
        counted = lab.run(ap, ["nft", "-j", "list", "counters"]).stdout
        counters = [c["counter"] for c in json.loads(counted)["nftables"] if "counter" in c]
        entries = lab.run(ap, ["conntrack", "-C"]).stdout
        figures[ap] = {c["name"]: c["packets"] for c in counters} | {"conntrack": int(entries)}
    return figures
