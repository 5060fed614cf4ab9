"""Keeps the kernel's state what it should be, whatever others do to it.

What a monitor gives reason to doubt is checked soon, many doubts at once; what no event tells, by
an audit every minute. A kernel that refuses is tried again every second. Checks may take a tenth of
the loop's time, so that two programs that fight about a piece of state don't stop the roams.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from apagent.errors import EventsLost, KernelFault
from apagent.kernel.port import EVERY_DOUBT, Doubt, StateMonitor
from apagent.reconcile import Reconciler

log = logging.getLogger(__name__)

SETTLE_S = 0.02
"""Between the first event and the check: a program that changes one thing often changes many. Not
where the table is concerned: it changes in transactions, and without it packets leak."""
PAUSE_S = 0.25
"""Between two checks, at least."""
SHARE = 0.1
"""How much of the time checks may take."""
RETRY_INTERVAL_S = 1.0
"""How often a kernel that refuses the desired state is tried again."""
AUDIT_INTERVAL_S = 60.0
AUDITED_SESSIONS = 20_000
"""An audit leaves the session maps out if they hold more: it would take the loop too long."""
FIGHT_S, FIGHT_REPAIRS = 60.0, 30
"""So many repairs in so many seconds are no accident; a restart of the network may take a dozen."""


@dataclass(frozen=True, slots=True)
class Clockwork:
    """Time: `now` in seconds, and `later`, which calls something after a number of seconds."""

    now: Callable[[], float]
    later: Callable[[float, Callable[[], None]], object]

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> Clockwork:
        """The time of an event loop."""
        return cls(loop.time, loop.call_later)


class Upkeep:
    """Checks the kernel's state when there is reason to. Call `start`, then `read` on events.

    `interfaces_changed` is called before the check where an interface has come, gone or changed;
    `sessions` says how many sessions the kernel should hold.
    """

    def __init__(
        self,
        reconciler: Reconciler,
        monitor: StateMonitor,
        interfaces_changed: Callable[[], None],
        sessions: Callable[[], int],
        clockwork: Clockwork,
    ) -> None:
        self._reconciler = reconciler
        self._monitor = monitor
        self._interfaces_changed = interfaces_changed
        self._sessions = sessions
        self._clockwork = clockwork
        self._doubts = Doubt(0)
        self._planned = False
        self._not_before = 0.0
        self._next_audit = 0.0
        self._repaired: deque[float] = deque(maxlen=FIGHT_REPAIRS)
        self._closed = False

    def fileno(self) -> int:
        """Readable when `read` has something to do."""
        return self._monitor.fileno()

    def start(self) -> None:
        """Begin to audit and to retry."""
        self._next_audit = self._clockwork.now() + AUDIT_INTERVAL_S
        self._clockwork.later(RETRY_INTERVAL_S, self._tick)

    def close(self) -> None:
        """Stop; what is installed stays."""
        self._closed = True
        self._monitor.close()

    def read(self) -> None:
        """Take the monitor's events in. Raises KernelFault."""
        try:
            self.doubt(self._monitor.read())
        except EventsLost as lost:
            log.warning("events on the kernel's state were lost (%s); checking all of it", lost)
            self.doubt(EVERY_DOUBT)

    def doubt(self, doubts: Doubt) -> None:
        """Plan a check, as soon as the last one allows."""
        self._doubts |= doubts
        if self._doubts and not self._planned:
            self._planned = True
            settle = 0.0 if Doubt.TABLE in self._doubts else SETTLE_S
            pause = max(settle, self._not_before - self._clockwork.now())
            self._clockwork.later(pause, self._check)

    @property
    def degraded(self) -> list[str]:
        """What a person should know and do, a sentence each."""
        many = len(self._repaired) == FIGHT_REPAIRS
        if not many or self._clockwork.now() - self._repaired[0] > FIGHT_S:
            return []
        text = (
            f"something on this machine keeps changing what is ours ({FIGHT_REPAIRS} repairs in "
            f"{FIGHT_S:.0f} s): the log says what it was; find the program that does it, or give "
            "us other names and numbers (kernel.*)"
        )
        return [text]

    def _tick(self) -> None:
        if self._closed:
            return
        now = self._clockwork.now()
        if self._reconciler.fault is not None:
            self.doubt(EVERY_DOUBT)
        elif now >= self._next_audit:
            self._next_audit = now + AUDIT_INTERVAL_S
            small = self._sessions() <= AUDITED_SESSIONS
            self.doubt(EVERY_DOUBT if small else Doubt.ROUTING | Doubt.INTERFACES)
        self._clockwork.later(RETRY_INTERVAL_S, self._tick)

    def _check(self) -> None:
        if self._closed:
            return
        doubts, self._doubts = self._doubts, Doubt(0)
        began, repairs = self._clockwork.now(), self._reconciler.repairs
        try:
            if Doubt.INTERFACES in doubts:
                self._attempt(self._interfaces_changed)
            self._reconciler.check(session_maps=Doubt.TABLE in doubts)
        finally:
            # Also after an error of ours: it must not be the last check.
            now = self._clockwork.now()
            if self._reconciler.repairs > repairs:
                self._repaired.append(now)
            self._not_before = now + max(PAUSE_S, (now - began) / SHARE)
            self._planned = False
            self.doubt(Doubt(0))

    @staticmethod
    def _attempt(action: Callable[[], None]) -> None:
        try:
            action()
        except KernelFault as fault:
            log.error("looking at the interfaces again: %s", fault)  # noqa: TRY400 - no trace
