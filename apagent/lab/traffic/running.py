"""A traffic program that runs in a node of the lab, and what it has reported so far."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, Protocol

from apagent.lab.errors import LabError

Event = dict[str, Any]

_CLOSE_TIMEOUT_S = 5.0
_PACKAGE = "apagent.lab.traffic"


class Starter(Protocol):
    """What starts programs in nodes: the lab."""

    def popen(self, node: str, argv: list[str], **kw: Any) -> subprocess.Popen[Any]:  # noqa: ANN401 - as Popen's
        """Start `argv` in `node`."""
        ...


class TrafficError(LabError):
    """A program ended, or stayed silent, before it reported what was waited for."""


class Running:
    """A started program; a thread of its own takes in its events.

    `program` is one of ours (`echo`) or the full name of a module that reports in the same way.
    """

    def __init__(self, starter: Starter, node: str, program: str, *options: object) -> None:
        self.name = f"{program} on {node}"
        module = program if "." in program else f"{_PACKAGE}.{program}"
        argv = [sys.executable, "-m", module, *map(str, options)]
        # In a session of its own, so that Ctrl-C reaches the starter only, who then ends it.
        self.process = starter.popen(
            node, argv, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self._events: list[Event] = []
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._take, name=self.name, daemon=True)
        self._thread.start()

    @property
    def events(self) -> list[Event]:
        """All that it has reported so far."""
        with self._changed:
            return list(self._events)

    def wait_ended(self, timeout_s: float) -> bool:
        """Wait until it has given its result or closed its output; False: it still runs."""
        with self._changed:
            return self._changed.wait_for(self._is_at_end, max(0.0, timeout_s))

    def wait_for(self, event: str, timeout_s: float) -> Event:
        """The first `event`, as soon as it is reported. Raises TrafficError."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                for seen in self._events:
                    if seen["event"] == event:
                        return seen
                left = deadline - time.monotonic()
                if self._ended or left <= 0:
                    how = "ended" if self._ended else f"ran for {timeout_s:g} s"
                    raise TrafficError(f"{self.name} {how} without the event '{event}'")
                self._changed.wait(left)

    def result(self, timeout_s: float) -> Event:
        """Its last word. Raises TrafficError."""
        return self.wait_for("result", timeout_s)

    def stop(self) -> None:
        """Ask it to end (SIGTERM); it may still report."""
        self.process.terminate()

    def close(self) -> None:
        """End it, by force if it must be, and take in the rest.

        A program that has given its result is at its end and is left to get there.
        """
        if not self.wait_ended(0):
            self.stop()
        try:
            self.process.wait(_CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._thread.join(_CLOSE_TIMEOUT_S)
        if self.process.stdout is not None:
            self.process.stdout.close()

    def _is_at_end(self) -> bool:
        return self._ended or any(event["event"] == "result" for event in self._events)

    def _take(self) -> None:
        for line in self.process.stdout or ():
            with self._changed:
                self._events.append(json.loads(line))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


@contextlib.contextmanager
def running(starter: Starter, node: str, program: str, *options: object) -> Iterator[Running]:
    """Run a program, named as in Running, in `node` for the length of the block."""
    started = Running(starter, node, program, *options)
    try:
        yield started
    finally:
        started.close()


@contextlib.contextmanager
def serving(starter: Starter, node: str = "server") -> Iterator[Running]:
    """Run `serve` in `node` for the length of the block; it listens when the block begins."""
    with running(starter, node, "serve") as server:
        server.wait_for("listening", 10.0)
        yield server
