"""What all applications have in common, and how a client roams under them."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from apagent.lab.lab import Lab
from apagent.lab.measure import Arrivals
from apagent.lab.plan import SERVER_ADDRESS, UPLINK
from apagent.lab.traffic.running import Running, running

SERVER = str(SERVER_ADDRESS)
START_S = 15.0
"""Far longer than any program here takes to start."""
END_S = 20.0
"""Far longer than any of them takes to end."""
_POLL_S = 0.02
_TOP = Path(__file__).parents[2]
_ports = itertools.count(9000)

Figures = dict[str, object]


class Broken(AssertionError):
    """An application did not survive; the text says what became of it."""


class Roam(NamedTuple):
    """A client's link came up at another AP (CLOCK_MONOTONIC, ns)."""

    client: str
    there: str
    linked_ns: int


class Application(Protocol):
    """An application that runs until it is told to finish."""

    def check(self) -> None:
        """Raise Broken if it has ended by itself."""
        ...

    def roamed(self, roam: Roam) -> None:
        """Its client has roamed."""
        ...

    def finish(self, roams: Sequence[Roam]) -> Figures:
        """End it in an orderly way; what it has to say. Raises Broken."""
        ...


@dataclass(frozen=True, slots=True)
class Scene:
    """Where an application runs: between this client and the server, with files of its own.

    What is left of it, should nobody end it, ends by itself after `for_s` seconds.
    """

    lab: Lab
    client: str
    directory: Path
    for_s: float = 300.0

    def popen(self, node: str, argv: list[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a program in a node, from where `-m tests.…` finds ours; options are Popen's."""
        return self.lab.popen(node, argv, cwd=_TOP, **options)

    @contextlib.contextmanager
    def process(
        self, node: str, argv: list[str], **options: Any
    ) -> Iterator[subprocess.Popen[Any]]:
        """Run a program that isn't ours for the length of the block."""
        bounded = ["timeout", "--kill-after=1", str(self.for_s), *argv]
        process = self.popen(node, bounded, stdin=subprocess.DEVNULL, **options)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(END_S)

    def program(
        self, node: str, program: str, *options: object
    ) -> contextlib.AbstractContextManager[Running]:
        """Run a program that reports like the traffic programs for the length of the block."""
        return running(self, node, program, *options, "--for-s", self.for_s)

    def anchor(self) -> str:
        """The address that a flow which the client opens now is translated to."""
        return uplink(self.lab, self.lab.location(self.client))

    def wait_until_listening(self, node: str, port: int) -> None:
        """Wait until a TCP server listens on that port of the node."""
        look = ["ss", "-Hltn", f"sport = :{port}"]
        wait_until(lambda: self.lab.run(node, look).stdout != "", f"port {port} of {node} is open")


def unused_port() -> int:
    """A port that no other application of this run listens on."""
    return next(_ports)


def uplink(lab: Lab, ap: str) -> str:
    """The address that the AP translates to."""
    return str(lab.plan.interface(ap, UPLINK).address)


def require(condition: object, what: str) -> None:
    """Raise Broken unless the condition holds."""
    if not condition:
        raise Broken(what)


def require_running(process: subprocess.Popen[Any], name: str) -> None:
    """Raise Broken if the program has ended."""
    require(process.poll() is None, f"{name} has ended with {process.poll()}")


def require_unfinished(program: Running) -> None:
    """Raise Broken if the program has ended or given its result."""
    require(not program.wait_ended(0), f"{program.name} has ended: {program.events[-3:]}")


def require_equal(what: str, found: object, wanted: object) -> None:
    """Raise Broken unless both are equal."""
    require(found == wanted, f"{what}: {found!r} instead of {wanted!r}")


def wait_until(look: Callable[[], bool], what: str, timeout_s: float = START_S) -> None:
    """Wait until `look` is true; raise Broken otherwise."""
    deadline = time.monotonic() + timeout_s
    while not look():
        require(time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}")
        time.sleep(_POLL_S)


def interruptions(arrivals: Arrivals, roams: Sequence[Roam]) -> Figures:
    """From link up to the first byte by way of the new AP, for each roam. Raises Broken."""
    found = [arrivals.interruption_ns(roam.linked_ns) for roam in roams]
    gaps = [round(gap / 1e6, 1) for gap in found if gap is not None]
    require(len(gaps) == len(roams), "nothing came any more after a roam")
    return {"interruptions_ms": gaps}


def rate_mbit(size: int, seconds: float) -> float:
    """Mean rate."""
    return round(size * 8 / seconds / 1e6, 2)
