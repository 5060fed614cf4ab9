"""When the kernel's state is checked: soon after a doubt, not too often, and every minute."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest

from apagent import upkeep
from apagent.errors import KernelFault
from apagent.kernel.port import EVERY_DOUBT, Doubt
from apagent.upkeep import AUDIT_INTERVAL_S, AUDITED_SESSIONS, Clockwork, Upkeep
from tests.fakes.kernel import FakeStateMonitor


class Time:
    """A clock that jumps from one planned call to the next."""

    def __init__(self) -> None:
        self.now = 100.0
        self._planned: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def later(self, delay_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._planned, (self.now + delay_s, next(self._numbers), action))

    def pass_s(self, seconds: float) -> None:
        end = self.now + seconds
        while self._planned and self._planned[0][0] <= end:
            self.now, _, action = heapq.heappop(self._planned)
            action()
        self.now = max(self.now, end)


@dataclass
class FakeReconciler:
    """Notes when it is asked for what, and takes its time."""

    time: Time
    fault: str | None = None
    repairs: int = 0
    takes_s: float = 0.0
    finds_damage: bool = False
    checks: list[tuple[float, bool]] = field(default_factory=list)

    def check(self, *, session_maps: bool) -> bool:
        self.checks.append((self.time.now, session_maps))
        self.time.now += self.takes_s
        self.repairs += self.finds_damage
        return self.fault is None


@dataclass
class Setting:
    time: Time = field(default_factory=Time)
    monitor: FakeStateMonitor = field(default_factory=FakeStateMonitor)
    sessions: int = 10
    looked: int = 0

    def __post_init__(self) -> None:
        self.reconciler = FakeReconciler(self.time)
        reconciler: Any = self.reconciler
        clockwork = Clockwork(lambda: self.time.now, self.time.later)
        self.upkeep = Upkeep(reconciler, self.monitor, self.look, lambda: self.sessions, clockwork)

    def look(self) -> None:
        self.looked += 1

    def happens(self, doubt: Doubt) -> None:
        self.monitor.tell(doubt)
        self.upkeep.read()

    @property
    def checks(self) -> list[bool]:
        """What each check was to include."""
        return [session_maps for _, session_maps in self.reconciler.checks]


@pytest.fixture
def setting() -> Setting:
    return Setting()


def test_a_burst_of_events_is_one_check(setting: Setting) -> None:
    for _ in range(5):
        setting.happens(Doubt.ROUTING)
    setting.time.pass_s(0.1)
    assert setting.checks == [False]


def test_no_doubt_no_check(setting: Setting) -> None:
    setting.happens(Doubt(0))
    setting.time.pass_s(1)
    assert setting.checks == []


def test_the_session_maps_are_read_when_the_table_is_in_doubt(setting: Setting) -> None:
    setting.happens(Doubt.ROUTING)
    setting.happens(Doubt.TABLE)
    setting.time.pass_s(0.1)
    assert setting.checks == [True]
    assert setting.looked == 0


def test_interfaces_are_looked_for_before_the_check(setting: Setting) -> None:
    setting.happens(Doubt.INTERFACES)
    assert setting.looked == 0
    setting.time.pass_s(0.1)
    assert (setting.looked, setting.checks) == (1, [False])


def test_lost_events_put_everything_in_doubt(setting: Setting) -> None:
    setting.monitor.lose_events()
    setting.upkeep.read()
    setting.time.pass_s(0.1)
    assert (setting.looked, setting.checks) == (1, [True])


def test_checks_keep_their_distance(setting: Setting) -> None:
    for _ in range(100):
        setting.happens(Doubt.ROUTING)
        setting.time.pass_s(0.01)
    assert 2 <= len(setting.checks) <= 1 / upkeep.PAUSE_S + 1


def test_long_checks_take_no_more_than_their_share(setting: Setting) -> None:
    setting.reconciler.takes_s = 1.0
    for _ in range(3000):
        setting.happens(Doubt.TABLE)
        setting.time.pass_s(0.01)
    assert len(setting.checks) == 3


def test_what_happens_during_a_pause_is_checked_after_it(setting: Setting) -> None:
    setting.happens(Doubt.ROUTING)
    setting.time.pass_s(0.1)
    setting.happens(Doubt.ROUTING)
    setting.time.pass_s(0.05)
    assert len(setting.checks) == 1
    setting.time.pass_s(upkeep.PAUSE_S)
    assert len(setting.checks) == 2


def test_an_audit_catches_what_no_event_told(setting: Setting) -> None:
    setting.upkeep.start()
    setting.time.pass_s(AUDIT_INTERVAL_S - 1)
    assert setting.checks == []
    setting.time.pass_s(3 * AUDIT_INTERVAL_S)
    assert setting.checks == [True] * 3


def test_an_audit_leaves_large_session_maps_out(setting: Setting) -> None:
    setting.sessions = AUDITED_SESSIONS + 1
    setting.upkeep.start()
    setting.time.pass_s(AUDIT_INTERVAL_S + 2)
    assert setting.checks == [False]


def test_a_fault_is_tried_again_every_second(setting: Setting) -> None:
    setting.upkeep.start()
    setting.reconciler.fault = "no memory"
    setting.time.pass_s(5.5)
    assert setting.checks == [True] * 5
    setting.reconciler.fault = None
    setting.time.pass_s(5)
    assert len(setting.checks) == 5


def test_a_fight_is_told_and_ends(setting: Setting) -> None:
    setting.reconciler.finds_damage = True
    for _ in range(upkeep.FIGHT_REPAIRS):
        assert setting.upkeep.degraded == []
        setting.happens(Doubt.ROUTING)
        setting.time.pass_s(1)
    [sentence] = setting.upkeep.degraded
    assert "keeps changing" in sentence
    setting.time.pass_s(upkeep.FIGHT_S)
    assert setting.upkeep.degraded == []


def test_checks_without_damage_are_no_fight(setting: Setting) -> None:
    for _ in range(2 * upkeep.FIGHT_REPAIRS):
        setting.happens(EVERY_DOUBT)
        setting.time.pass_s(1)
    assert setting.upkeep.degraded == []


def test_a_failed_look_keeps_no_check_from_being_made(setting: Setting) -> None:
    def fail() -> None:
        raise KernelFault("no answer")

    setting.upkeep._interfaces_changed = fail
    setting.happens(Doubt.INTERFACES)
    setting.time.pass_s(1)
    assert setting.checks == [False]


def test_an_error_of_ours_in_a_check_is_not_the_end_of_checks(setting: Setting) -> None:
    def fail() -> None:
        raise ValueError("what nobody has thought of")

    setting.upkeep._interfaces_changed = fail
    setting.happens(Doubt.INTERFACES)
    with pytest.raises(ValueError, match="nobody"):
        setting.time.pass_s(1)
    setting.happens(Doubt.ROUTING)
    setting.time.pass_s(1)
    assert setting.checks == [False]


def test_nothing_happens_after_the_end(setting: Setting) -> None:
    setting.upkeep.start()
    setting.upkeep.doubt(Doubt.ROUTING)
    setting.upkeep.close()
    setting.time.pass_s(2 * AUDIT_INTERVAL_S)
    assert setting.checks == []
