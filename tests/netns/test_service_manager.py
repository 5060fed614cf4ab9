"""What a service manager hears of a running agent, and what becomes of one that is stuck."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import time
from collections.abc import Sequence

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


def watched(lab: Lab, ap: str, *variables: str, program: Sequence[str] = ()) -> None:
    """Start an AP's agent anew with a watchdog."""
    lab.kill_agent(ap)
    period = f"WATCHDOG_USEC={PERIOD_S * 1_000_000}"
    lab.agents.commands[ap] = [
        *("env", *variables, period),
        *(program or [programs.path("apagent")]),
    ]
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


HANGING = """
import asyncio, sys, time
from apagent.agent import Agent
from apagent.cli.agent import main
listen = Agent.listen
def listen_and_hang(*arguments):
    listen(*arguments)
    asyncio.get_running_loop().call_later(3, time.sleep, 60)
Agent.listen = listen_and_hang
sys.exit(main())
"""
"""An agent whose loop stands still after three seconds."""


def test_where_nobody_listens_a_stuck_agent_ends_itself(domain: Lab) -> None:
    watched(domain, "ap1", "--unset=NOTIFY_SOCKET", program=[sys.executable, "-c", HANGING])
    eventually(lambda: "in sync with every peer" in domain.agents.log_end("ap1", 5))
    becomes(lambda: domain.agents.process("ap1"), None, 15.0)
    log = domain.agents.log_end("ap1", 200)
    assert "Timeout" in log
    assert "most recent call first" in log
    del domain.agents.commands["ap1"]
    domain.start_agent("ap1")
