"""What the service manager is told: that we live, only when it is true, and how we are.

Being alive is more than a loop that turns. Each part of the agent is looked at a few times in a
watchdog's period, and one that hasn't been seen well for half of it withholds the ping, whatever
the others do. Then the service manager ends us and starts us again; what is installed goes on
forwarding meanwhile.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Protocol

from apagent.errors import ApagentError

log = logging.getLogger(__name__)

LOOKS_A_PERIOD = 4
"""Two looks may fail, on a machine that is very busy, before a ping is withheld."""
STATUS_INTERVAL_S = 5.0
"""How old the status may be that the service manager shows."""

Check = Callable[[], Awaitable[None]]
"""Looks at one part. Raises ApagentError, or takes too long, if it is not well."""


class Watchdog:
    """Knows when each part was seen well last, and tells which ones are stuck.

    `patience_s` is how long a part may go unseen. Times are those of any clock, in seconds.
    """

    def __init__(self, parts: Iterable[str], patience_s: float, now: float) -> None:
        self._seen = dict.fromkeys(parts, now)
        self._patience_s = patience_s

    def see(self, part: str, now: float) -> None:
        """The part is well."""
        self._seen[part] = now

    def stuck(self, now: float) -> list[str]:
        """The parts that have not been seen well for too long. Empty: a ping tells the truth."""
        return [part for part, seen in self._seen.items() if now - seen > self._patience_s]


class Manager(Protocol):
    """Who watches over us."""

    def alive(self) -> None:
        """We are alive."""

    def status(self, text: str) -> None:
        """How we are, in a line."""


class ServiceManager:
    """systemd, or what speaks its protocol (sd_notify(3))."""

    def __init__(self, notify: Callable[[str], None]) -> None:
        self._notify = notify

    def alive(self) -> None:
        """Send the ping."""
        self._notify("WATCHDOG=1")

    def status(self, text: str) -> None:
        """Send the status line."""
        self._notify(f"STATUS={text}")


class OwnEnd:
    """For a service manager that only restarts what has ended (procd): ends us if need be.

    A thread without need of the interpreter writes to stderr where every thread stands, and ends
    the process, unless it hears of us in time (faulthandler.dump_traceback_later()).
    """

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s

    def alive(self) -> None:
        """Put off the end."""
        faulthandler.dump_traceback_later(self._period_s, exit=True)

    def status(self, text: str) -> None:
        """Nobody shows it."""


class Supervision:
    """Looks at every part, and tells the manager. `run` it as a task.

    `period_s` is the watchdog's period, None: nobody watches, and only the status is told; `status`
    gives it; `clock` is in seconds.
    """

    def __init__(
        self,
        manager: Manager,
        period_s: float | None,
        checks: Mapping[str, Check],
        status: Callable[[], str],
        clock: Callable[[], float],
    ) -> None:
        self._manager = manager
        self._checks = checks
        self._status = status
        self._clock = clock
        self._watched = period_s is not None
        period = period_s or LOOKS_A_PERIOD * STATUS_INTERVAL_S
        self.interval_s = min(STATUS_INTERVAL_S, period / LOOKS_A_PERIOD)
        self._watchdog = Watchdog(checks, period / 2, clock())
        self._told = ""
        self._complaint = ""

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(self.interval_s)

    async def look(self) -> None:
        """Look at every part once; say that we live if it is true, and how we are if it is news."""
        if self._watched:
            await asyncio.gather(*(self._try(part, check) for part, check in self._checks.items()))
            self._ping()
        text = self._complaint or self._status()
        if text != self._told:
            self._told = text
            self._manager.status(text)

    async def _try(self, part: str, check: Check) -> None:
        try:
            async with asyncio.timeout(self.interval_s):
                await check()
        except ApagentError as error:
            log.warning("%s: %s", part, error)
        except TimeoutError:
            log.warning("%s gives no answer within %.1f s", part, self.interval_s)
        else:
            self._watchdog.see(part, self._clock())

    def _ping(self) -> None:
        stuck = self._watchdog.stuck(self._clock())
        complaint = f"stuck: {', '.join(stuck)}" if stuck else ""
        if complaint and complaint != self._complaint:
            log.critical("%s; the service manager should start us again", complaint)
        self._complaint = complaint
        if not stuck:
            self._manager.alive()


def status_line(degraded: Sequence[str], *, in_sync: bool) -> str:
    """How we are, for `systemctl status`: the first reason, and how many more there are."""
    if not degraded:
        return "in sync" if in_sync else "not in sync yet"
    more = f" (and {len(degraded) - 1} more: apctl status)" if len(degraded) > 1 else ""
    return f"{'degraded' if in_sync else 'not in sync yet'}: {degraded[0]}{more}"
