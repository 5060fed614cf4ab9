"""Agents of a lab that die at a given step (`crashing`)."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from apagent.lab.lab import Lab
from tests.netns import crashing
from tests.netns.observe import eventually

DIES_S = 10.0
EVERY_STEP = "APAGENT_TEST_EVERY_STEP"
"""An environment variable: leave no step out, which takes five minutes."""

_T = TypeVar("_T")


def every_step() -> bool:
    """Whether no step is to be left out."""
    return bool(os.environ.get(EVERY_STEP))


def some(steps: Sequence[_T], usual: int) -> Sequence[_T]:
    """The first ones, one of each kind, where not every step is asked for."""
    return steps if every_step() else steps[:usual]


def make_mortal(lab: Lab, ap: str) -> None:
    """From its next start on, the agent of `ap` can be told to die."""
    program = str(Path(crashing.__file__))
    lab.agents.commands[ap] = [sys.executable, program, str(plan(lab, ap))]


def plan(lab: Lab, ap: str) -> Path:
    """What the agent of `ap` reads when it is to die."""
    return lab.place.ap_directory(ap) / "crash.plan"


def start_to_die(lab: Lab, ap: str, step: str) -> None:
    """Start an agent that dies at `step`."""
    plan(lab, ap).write_text(step, encoding="ascii")
    lab.agents.start(ap)
    wait_died(lab, ap)


def tell_to_die(lab: Lab, ap: str, step: str) -> None:
    """The agent of `ap` dies when it comes to `step`."""
    plan(lab, ap).write_text(step, encoding="ascii")
    lab.agents.kill(ap, signal.SIGUSR1)
    eventually(lambda: not plan(lab, ap).exists())


def wait_died(lab: Lab, ap: str) -> None:
    """Wait until it has died as it was told to."""
    lab.agents.wait_ended(ap, DIES_S)
    log = lab.agents.log_end(ap, 1)
    assert crashing.DIES in log, log
