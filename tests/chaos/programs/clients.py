"""The clients' end of all flows, in one process: its sockets are made in the clients' namespaces.

Commands on stdin, a line each: `open NUMBER CLIENT KIND`, `close NUMBER`, `finish SECONDS` (close
all, and wait so long for their ends). Events on stdout: `ready`, a `flow` for each when it is over
(what `tests.chaos.record.Record` has), `result`.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Iterable

from apagent.lab.place import Place
from apagent.lab.traffic.jsonl import emit
from tests.chaos.programs.flow import Flow
from tests.chaos.programs.flows import FLOWS
from tests.chaos.schedule import Kind


class Fleet:
    """All flows that are open."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._tasks: dict[int, tuple[Flow, asyncio.Task[None]]] = {}

    def open(self, number: int, client: str, kind: Kind) -> None:
        """Start a flow."""
        flow = FLOWS[kind](number, client, self._place.namespace(client))
        task = asyncio.create_task(flow.run(), name=f"flow {number}")
        task.add_done_callback(lambda _: self._report(number))
        self._tasks[number] = flow, task

    def close(self, number: int) -> None:
        """Ask a flow to end."""
        if number in self._tasks:
            self._tasks[number][0].closing.set()

    async def finish(self, patience_s: float) -> None:
        """Ask all to end, and end those that don't."""
        for number in self._tasks:
            self.close(number)
        for wait_s in (patience_s, None):
            tasks = [task for _, task in self._tasks.values()]
            if tasks:
                _, late = await asyncio.wait(tasks, timeout=wait_s)
                for task in late:
                    task.cancel()

    def _report(self, number: int) -> None:
        flow, task = self._tasks.pop(number)
        if not task.cancelled() and task.exception() is not None:
            flow.lose(f"error of the test's own: {task.exception()!r}")
        elif task.cancelled():
            flow.lose("silent")
        emit("flow", **flow.record())


async def _run(place: Place) -> None:
    fleet = Fleet(place)
    commands = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    emit("ready", time_ns=time.monotonic_ns())
    while line := (await commands.readline()).decode().split():
        await _obey(fleet, line)
        if line[0] == "finish":
            break
    emit("result")


async def _obey(fleet: Fleet, line: Iterable[str]) -> None:
    match list(line):
        case ["open", number, client, kind]:
            fleet.open(int(number), client, Kind(kind))
        case ["close", number]:
            fleet.close(int(number))
        case ["finish", patience_s]:
            await fleet.finish(float(patience_s))
        case other:
            raise ValueError(f"no such command: {other}")


def main() -> int:
    """Run the program."""
    _, prefix, root = sys.argv
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_run(Place.of(prefix, root)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
