"""Processes that may have been started by another run of the lab.

A process id alone may have been given to somebody else by now. So a process is known by its id and
its start time, and is signalled through a pidfd, which never points to another process.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from apagent.lab.errors import LabError

_PROC = Path("/proc")
_START_TIME_FIELD, _FIELDS_BEFORE = 22, 3
"""Of /proc/PID/stat, counted from 1 (proc(5)); the third is the first one after the name."""


@dataclass(frozen=True, slots=True)
class Process:
    """A process, and when it started (clock ticks since boot)."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The process with this id; None: there is none."""
        try:
            text = (_PROC / str(pid) / "stat").read_text(encoding="ascii", errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            return None
        fields = text[text.rindex(")") + 2 :].split()
        return cls(pid, int(fields[_START_TIME_FIELD - _FIELDS_BEFORE]))

    @classmethod
    def load(cls, file: Path) -> Process | None:
        """What `save` wrote; None: nothing (complete) is there."""
        try:
            pid, started = file.read_text(encoding="ascii").split()
            return cls(int(pid), int(started))
        except (FileNotFoundError, ValueError):
            return None

    def save(self, file: Path) -> None:
        """Write it to a pid file."""
        file.write_text(f"{self.pid} {self.started}\n", encoding="ascii")

    @property
    def alive(self) -> bool:
        """Whether this very process still runs.

        What is left of it until its parent asks (a zombie) doesn't; but as long as one of its
        threads is about to end, it does, and holds its ports. A pidfd knows the difference.
        """
        return not self.wait(0)

    def signal(self, number: int) -> bool:
        """Send a signal; False: the process has ended."""
        with self._open() as descriptor:
            if descriptor is None or _ended(descriptor, 0):
                return False
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, number)
                return True
            return False

    def wait(self, timeout_s: float) -> bool:
        """Wait for its end; False: it still runs after `timeout_s`."""
        with self._open() as descriptor:
            return descriptor is None or _ended(descriptor, timeout_s)

    @contextlib.contextmanager
    def _open(self) -> Iterator[int | None]:
        """A pidfd of this very process; None: it is gone."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            yield None
            return
        try:
            # The descriptor came first: if the start time is right now, it belongs to it.
            yield descriptor if Process.of(self.pid) == self else None
        finally:
            os.close(descriptor)


def _ended(descriptor: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def stop(processes: Iterable[Process], patience_s: float) -> None:
    """Ask all to end, and kill those that have not after `patience_s`. Raises LabError."""
    running = [process for process in processes if process.signal(signal.SIGTERM)]
    deadline = time.monotonic() + patience_s
    for process in running:
        if not process.wait(max(0.0, deadline - time.monotonic())):
            process.signal(signal.SIGKILL)
    for process in running:
        if not process.wait(patience_s):
            raise LabError(f"process {process.pid} doesn't end, even when killed")


def in_namespaces(identities: Collection[tuple[int, int]]) -> list[Process]:
    """The processes in any of these network namespaces, except this one."""
    found = (Process.of(pid) for pid in _pids() if _network_namespace(pid) in identities)
    return [process for process in found if process is not None]


def _pids() -> Iterator[int]:
    for entry in _PROC.iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            yield int(entry.name)


def _network_namespace(pid: int) -> tuple[int, int] | None:
    """None: the process has ended, or isn't ours to look at."""
    try:
        stat = (_PROC / str(pid) / "ns/net").stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino
