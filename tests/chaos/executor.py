"""Carries a schedule out, and notes what was done when.

Roams and flows go by one thread and are in time; faults go by another one, for an AP needs a second
to die and longer to boot. A third kind of thread waits for each agent that was started.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from apagent.errors import ApagentError
from apagent.lab.faults import Faults
from apagent.lab.lab import Lab
from tests.chaos.flows import Flows
from tests.chaos.schedule import Cut, Fault, Roam, Schedule, Trouble
from tests.chaos.timeline import Done, What

Say = Callable[[str], None]

_READY_TIMEOUT_S = 30.0
_POLL_S = 0.1
_GUARDED = ["nft", "list", "chain", "inet", "apagent", "leak_guard"]


class Executor:
    """Does what is scheduled; `done` is what was, in the end."""

    def __init__(self, lab: Lab, flows: Flows, schedule: Schedule, say: Say) -> None:
        self.done: list[Done] = []
        self.errors: list[str] = []
        """What could not be done."""
        self.start_ns = time.monotonic_ns()
        self.started = ""
        """By the wall clock."""
        self._lab = lab
        self._flows = flows
        self._schedule = schedule
        self._say = say
        self._faults = Faults(lab)
        self._cuts: list[Cut] = []
        self._off_air: set[str] = set()
        self._waiters: list[threading.Thread] = []
        self._lock = threading.Lock()

    def run(self) -> None:
        """All of it; at the end everything is mended, and every agent runs."""
        self.start_ns = time.monotonic_ns()
        self.started = dt.datetime.now().astimezone().isoformat(timespec="milliseconds")
        breaker = threading.Thread(target=self._work, args=(self._fault_steps(),), name="faults")
        breaker.start()
        self._work(self._client_steps())
        breaker.join()
        for waiter in self._waiters:
            waiter.join()

    def now(self) -> float:
        """Seconds since the start."""
        return (time.monotonic_ns() - self.start_ns) / 1e9

    def _work(self, steps: Iterator[tuple[float, str, Callable[[], None]]]) -> None:
        for at, what, step in steps:
            time.sleep(max(0.0, at - self.now()))
            try:
                step()
            except (ApagentError, OSError) as error:
                self.errors.append(f"{self.now():.2f} {what}: {error}")
                self._say(self.errors[-1])

    # --- what is to be done, in order

    def _client_steps(self) -> Iterator[tuple[float, str, Callable[[], None]]]:
        plan = self._schedule
        steps = [(r.at, f"roam of {r.client}", lambda r=r: self._roam(r)) for r in plan.roams]
        for t in plan.talks:
            steps.append((t.begin, f"flow {t.number}", lambda t=t: self._flows.open(t)))
            steps.append((t.end, f"flow {t.number}", lambda t=t: self._flows.close(t)))
        # What begins at the very end of all isn't worth it.
        yield from sorted(
            (step for step in steps if step[0] < plan.seconds), key=lambda step: step[0]
        )

    def _fault_steps(self) -> Iterator[tuple[float, str, Callable[[], None]]]:
        steps = []
        for f in self._schedule.faults:
            steps.append((f.begin, f"begin of {f}", lambda f=f: self._begin(f)))
            steps.append((f.end, f"end of {f}", lambda f=f: self._end(f)))
        yield from sorted(steps, key=lambda step: step[0])

    def _roam(self, roam: Roam) -> None:
        here = self._lab.location(roam.client)
        on_air = [ap for ap in (roam.ap, *self._lab.aps) if ap not in self._off_air]
        there = next((ap for ap in on_air if ap != here), here)
        if there != roam.ap:
            # It boots more slowly than was planned.
            self._say(f"{self.now():7.2f}  {roam.client} roams to {there}, not to {roam.ap}")
            roam = replace(roam, ap=there)
        begun = self.now()
        self._lab.roam(roam.client, roam.ap, carrier=roam.carrier)
        self._note(Done(What.ROAM, begun, self.now(), roam=roam))

    # --- faults

    def _begin(self, fault: Fault) -> None:
        self._say(f"{self.now():7.2f}  {fault}")
        with self._noted(What.BEGIN, fault):
            match fault.trouble:
                case Trouble.POWER:
                    self._off_air.add(fault.ap)
                    self._faults.power_off(fault.ap)
                case Trouble.KILL:
                    self._lab.kill_agent(fault.ap)
                case Trouble.STOP:
                    self._lab.kill_agent(fault.ap, signal.SIGTERM)
                case Trouble.FREEZE:
                    self._lab.agents.kill(fault.ap, signal.SIGSTOP)
                case Trouble.UPLINK:
                    self._faults.unplug_uplink(fault.ap)
                case Trouble.CABLE:
                    self._faults.unplug_backhaul(fault.ap)
                case Trouble.PARTITION:
                    self._cut([*self._cuts, *fault.cuts])
                case Trouble.FLUSH:
                    self._lab.run(fault.ap, ["nft", "flush", "ruleset"])
                case Trouble.DRAIN:
                    self._lab.apctl(fault.ap, "drain")

    def _end(self, fault: Fault) -> None:
        self._say(f"{self.now():7.2f}  end of {fault}")
        with self._noted(What.END, fault):
            match fault.trouble:
                case Trouble.POWER:
                    self._faults.boot(fault.ap)
                    self._await(fault.ap)
                case Trouble.KILL | Trouble.STOP:
                    self._lab.agents.start(fault.ap)
                    self._await(fault.ap)
                case Trouble.FREEZE:
                    self._lab.agents.kill(fault.ap, signal.SIGCONT)
                    self._ready(fault.ap)
                case Trouble.UPLINK:
                    self._faults.plug_uplink(fault.ap)
                case Trouble.CABLE:
                    self._faults.plug_backhaul(fault.ap)
                case Trouble.PARTITION:
                    left = list(self._cuts)
                    for cut in fault.cuts:
                        left.remove(cut)
                    self._cut(left)
                case Trouble.FLUSH:
                    pass
                case Trouble.DRAIN:
                    self._lab.apctl(fault.ap, "undrain")

    def _cut(self, cuts: list[Cut]) -> None:
        self._cuts = cuts
        self._faults.cut_exactly(cuts)

    def _await(self, ap: str) -> None:
        """Note when the agent that was started is in sync."""

        def wait() -> None:
            # It may be killed before; then the next one's readiness counts.
            with contextlib.suppress(ApagentError, OSError, KeyError):
                self._radio_on(ap)
                self._lab.agents.wait_ready([ap], _READY_TIMEOUT_S)
                self._ready(ap)

        waiter = threading.Thread(target=wait, name=f"readiness of {ap}")
        waiter.start()
        self._waiters.append(waiter)

    def _radio_on(self, ap: str) -> None:
        """An AP that has booted goes on the air as soon as its kernel can translate."""
        while ap in self._off_air and self._lab.agents.process(ap) is not None:
            guarded = self._lab.run(ap, _GUARDED, check=False).returncode == 0
            if guarded:
                self._faults.radio_on(ap)
                self._off_air.discard(ap)
            time.sleep(_POLL_S)

    def _ready(self, ap: str) -> None:
        self._note(Done(What.READY, self.now(), self.now(), ap=ap))

    @contextlib.contextmanager
    def _noted(self, what: What, fault: Fault) -> Iterator[None]:
        begun = self.now()
        try:
            yield
        finally:
            self._note(Done(what, begun, self.now(), fault=fault))

    def _note(self, done: Done) -> None:
        with self._lock:
            self.done.append(done)
