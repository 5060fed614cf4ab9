"""The flows of a run: the processes at both ends, told what to do."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

from apagent.lab.lab import Lab
from apagent.lab.plan import SERVER
from apagent.lab.traffic.running import Running
from tests.chaos.record import Event
from tests.chaos.schedule import Talk

_PROGRAMS = "tests.chaos.programs"
_START_TIMEOUT_S = 15.0


class _Beside:
    """Starts the clients' process where we are: it enters the clients' namespaces by itself."""

    def popen(self, node: str, argv: list[str], **options: Any) -> subprocess.Popen[Any]:
        return subprocess.Popen(argv, stdin=subprocess.PIPE, **options)


class Flows:
    """All flows; commands may come from several threads."""

    def __init__(self, server: Running, clients: Running) -> None:
        self._server = server
        self._clients = clients
        self._lock = threading.Lock()

    def open(self, talk: Talk) -> None:
        """Have a client open a flow."""
        self._command("open", talk.number, talk.client, talk.kind)

    def close(self, talk: Talk) -> None:
        """Have it end it."""
        self._command("close", talk.number)

    def finish(self, patience_s: float) -> tuple[list[Event], list[Event]]:
        """End all; what the clients say of each flow, and what the server has seen."""
        self._command("finish", patience_s)
        self._clients.result(patience_s + _START_TIMEOUT_S)
        flows: list[Event] = [event for event in self._clients.events if event["event"] == "flow"]
        return flows, list(self._server.events)

    def _command(self, *words: object) -> None:
        pipe = self._clients.process.stdin
        if pipe is None:
            raise BrokenPipeError("the clients' process has no input")
        with self._lock:
            pipe.write(" ".join(map(str, words)) + "\n")
            pipe.flush()


@contextlib.contextmanager
def flowing(lab: Lab, for_s: float) -> Iterator[Flows]:
    """Run both ends for the length of the block, `for_s` at most."""
    with contextlib.ExitStack() as stack:
        server = Running(lab, SERVER, f"{_PROGRAMS}.server", "--for-s", for_s)
        stack.callback(server.close)
        place = lab.place
        clients = Running(_Beside(), "clients", f"{_PROGRAMS}.clients", place.prefix, place.root)
        stack.callback(_close, clients)
        server.wait_for("listening", _START_TIMEOUT_S)
        clients.wait_for("ready", _START_TIMEOUT_S)
        yield Flows(server, clients)


def _close(clients: Running) -> None:
    if clients.process.stdin is not None:
        with contextlib.suppress(OSError):
            clients.process.stdin.close()
    clients.close()
