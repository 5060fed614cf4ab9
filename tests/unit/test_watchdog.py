"""The service manager hears that we live only when it is true, and how we are."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from apagent.errors import ApagentError, KernelFault
from apagent.notify import notify, watchdog_period_s
from apagent.watchdog import (
    LOOKS_A_PERIOD,
    STATUS_INTERVAL_S,
    Check,
    ServiceManager,
    Supervision,
    Watchdog,
    status_line,
)

PERIOD_S = 0.4


# --- the decision


def test_what_is_seen_in_time_is_not_stuck() -> None:
    watchdog = Watchdog(["kernel", "feed"], 10.0, now=100.0)
    assert watchdog.stuck(110.0) == []
    watchdog.see("kernel", 110.0)
    watchdog.see("feed", 109.0)
    assert watchdog.stuck(119.0) == []


def test_one_stuck_part_is_enough() -> None:
    watchdog = Watchdog(["kernel", "feed"], 10.0, now=100.0)
    for now in range(100, 112):
        watchdog.see("kernel", float(now))
    assert watchdog.stuck(111.0) == ["feed"]


def test_a_part_that_recovers_is_not_stuck() -> None:
    watchdog = Watchdog(["feed"], 10.0, now=100.0)
    assert watchdog.stuck(111.0) == ["feed"]
    watchdog.see("feed", 112.0)
    assert watchdog.stuck(112.0) == []


# --- the looks


@dataclass
class Setting:
    """Two parts, a service manager that takes notes, and a clock."""

    period_s: float | None = PERIOD_S
    now: float = 0.0
    told: list[str] = field(default_factory=list)
    text: str = "in sync"
    fault: ApagentError | None = None
    hangs: bool = False

    def __post_init__(self) -> None:
        checks: dict[str, Check] = {"kernel": self.answer, "feed": self.turn}
        self.supervision = Supervision(
            ServiceManager(self.told.append),
            self.period_s,
            checks,
            lambda: self.text,
            lambda: self.now,
        )

    async def answer(self) -> None:
        if self.fault is not None:
            raise self.fault

    async def turn(self) -> None:
        if self.hangs:
            await asyncio.Event().wait()

    def look(self, times: int = 1) -> list[str]:
        """What is told in so many looks, each at its time."""
        self.told.clear()
        for _ in range(times):
            self.now += self.supervision.interval_s
            asyncio.run(self.supervision.look())
        return list(self.told)


@pytest.fixture
def setting() -> Setting:
    return Setting()


def test_every_look_pings_and_news_are_told_once(setting: Setting) -> None:
    assert setting.look(2) == ["WATCHDOG=1", "STATUS=in sync", "WATCHDOG=1"]
    setting.text = "degraded: no room"
    assert setting.look(2) == ["WATCHDOG=1", "STATUS=degraded: no room", "WATCHDOG=1"]


def test_a_ping_comes_at_least_at_half_of_the_period(setting: Setting) -> None:
    assert setting.supervision.interval_s <= PERIOD_S / 2


def test_a_kernel_that_does_not_answer_withholds_the_ping(setting: Setting) -> None:
    setting.look()
    setting.fault = KernelFault("no answer")
    assert "WATCHDOG=1" in setting.look()
    setting.look(LOOKS_A_PERIOD)
    assert "WATCHDOG=1" not in setting.look()
    setting.fault = None
    assert setting.look() == ["WATCHDOG=1", "STATUS=in sync"]


def test_a_part_that_hangs_withholds_the_ping_and_is_named(setting: Setting) -> None:
    setting.look()
    setting.hangs = True
    told = setting.look(LOOKS_A_PERIOD)
    assert told[-1] == "STATUS=stuck: feed"
    assert setting.look() == []


def test_a_fault_of_our_own_in_a_check_is_not_swallowed(setting: Setting) -> None:
    async def fail() -> None:
        raise ZeroDivisionError

    setting.supervision._checks = {"kernel": fail}
    with pytest.raises(ZeroDivisionError):
        setting.look()


def test_without_a_watchdog_only_the_status_is_told() -> None:
    setting = Setting(period_s=None, fault=KernelFault("no answer"))
    assert setting.look(2) == ["STATUS=in sync"]
    assert setting.supervision.interval_s == STATUS_INTERVAL_S


def test_a_loop_that_does_not_turn_pings_nobody(setting: Setting) -> None:
    async def stand_still() -> list[str]:
        task = asyncio.create_task(setting.supervision.run())
        await asyncio.sleep(2.5 * setting.supervision.interval_s)
        before = setting.told.count("WATCHDOG=1")
        assert before
        time.sleep(5 * setting.supervision.interval_s)  # noqa: ASYNC251 - that is the point
        after = setting.told.count("WATCHDOG=1")
        task.cancel()
        return [str(before), str(after)]

    before, after = asyncio.run(stand_still())
    assert before == after


@pytest.mark.parametrize(
    ("degraded", "in_sync", "line"),
    [
        ([], True, "in sync"),
        ([], False, "not in sync yet"),
        (["a is down"], True, "degraded: a is down"),
        (["a", "b", "c"], True, "degraded: a (and 2 more: apctl status)"),
        (["a"], False, "not in sync yet: a"),
    ],
)
def test_the_status_is_one_line(degraded: list[str], in_sync: bool, line: str) -> None:
    assert status_line(degraded, in_sync=in_sync) == line


# --- the way to the service manager


@pytest.mark.parametrize(
    ("environment", "period_s"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "42"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "43"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "-1"}, None),
        ({}, None),
    ],
)
def test_the_period(environment: dict[str, str], period_s: float | None) -> None:
    assert watchdog_period_s(environment, 42) == period_s


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    path = str(tmp_path / "notify.sock")
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(path)
        yield listener


def test_a_notification_arrives(manager: socket.socket) -> None:
    notify("STATUS=ready to go")
    assert manager.recv(100) == b"STATUS=ready to go"


def test_a_service_manager_that_does_not_listen_stops_nobody(manager: socket.socket) -> None:
    for _ in range(3000):
        notify("WATCHDOG=1")
    assert manager.recv(100) == b"WATCHDOG=1"


def test_where_nobody_can_be_told_the_process_ends_itself() -> None:
    program = (
        "import time\n"
        "from apagent.watchdog import OwnEnd\n"
        "end = OwnEnd(0.5)\n"
        "for _ in range(4):\n"
        "    end.alive()\n"
        "    time.sleep(0.2)\n"
        "print('still here', flush=True)\n"
        "time.sleep(30)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 1
    assert done.stdout == "still here\n"
    assert "Timeout" in done.stderr
    assert "line 8" in done.stderr
