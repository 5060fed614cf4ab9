"""What a service manager hears of a running agent, and what becomes of one that is stuck."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time

import pytest

from apagent.lab import programs
from apagent.lab.lab import Lab
from tests.netns.conftest import MakeLab
from tests.netns.observe import becomes, eventually

pytestmark = pytest.mark.netns

PERIOD_S = 2


@pytest.fixture(scope="module")
def domain(module_lab: MakeLab) -> Lab:
    return module_lab(aps=2, clients=0)


def watched(lab: Lab, ap: str, *variables: str) -> None:
    """Start an AP's agent anew with a watchdog."""
    lab.kill_agent(ap)
    period = f"WATCHDOG_USEC={PERIOD_S * 1_000_000}"
    lab.agents.commands[ap] = ["env", *variables, period, programs.path("apagent")]
    lab.agents.prepare(ap)
    lab.agents.start(ap)


class Manager:
    """The service manager's end of an agent's notifications."""

    def __init__(self, lab: Lab, ap: str) -> None:
        self._socket: socket.socket = lab.agents.notifications(ap)
        self._socket.settimeout(0)
        self.heard: list[tuple[float, str]] = []

    def listen(self) -> list[str]:
        """All that was told so far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                text = self._socket.recv(4096).decode()
                self.heard.append((time.monotonic(), text))
        return [text for _, text in self.heard]

    def pings(self) -> int:
        return self.listen().count("WATCHDOG=1")


def test_a_healthy_agent_pings_and_tells_how_it_is(domain: Lab) -> None:
    watched(domain, "ap1")
    manager = Manager(domain, "ap1")
    eventually(lambda: manager.pings() >= 4)
    assert "READY=1" in manager.listen()
    eventually(lambda: "STATUS=in sync" in manager.listen())
    domain.kill_agent("ap2")
    eventually(lambda: manager.listen()[-1].startswith("STATUS=degraded: peer ap2"), 15.0)
    before = manager.pings()
    eventually(lambda: manager.pings() >= before + 4)
    domain.start_agent("ap2")
    eventually(lambda: [t for t in manager.listen() if "STATUS" in t][-1] == "STATUS=in sync")


def test_a_stopped_agent_pings_nobody(domain: Lab) -> None:
    watched(domain, "ap1")
    manager = Manager(domain, "ap1")
    eventually(lambda: manager.pings() >= 2)
    domain.agents.kill("ap1", signal.SIGSTOP)
    manager.listen()
    before = manager.pings()
    time.sleep(PERIOD_S)
    assert manager.pings() == before
    domain.agents.kill("ap1", signal.SIGCONT)
    eventually(lambda: manager.pings() > before)


def test_where_nobody_listens_a_stuck_agent_ends_itself(domain: Lab) -> None:
    """What stops it here is stopped for longer than the period, and then goes on."""
    watched(domain, "ap1", "--unset=NOTIFY_SOCKET")
    eventually(lambda: "in sync with every peer" in domain.agents.log_end("ap1", 5))
    time.sleep(1.5 * PERIOD_S)
    pid = domain.agent_pid("ap1")
    os.kill(pid, signal.SIGSTOP)
    time.sleep(PERIOD_S + 0.5)
    os.kill(pid, signal.SIGCONT)
    becomes(lambda: domain.agents.process("ap1"), None)
    assert "Timeout" in domain.agents.log_end("ap1", 200)
    del domain.agents.commands["ap1"]
    domain.start_agent("ap1")
