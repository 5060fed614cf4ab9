"""`apagent` that kills itself at a step of its work.

    python crashing.py PLAN run --config FILE

PLAN is a file: `before` or `after`, a number and a target, such as

    after 2 apagent.kernel.linux:LinuxDataPath.apply

The process ends by SIGKILL before or after its second call of that method. It reads the plan when
it starts, if there is one, and when it is told to by SIGUSR1.

The kernel's state changes within a system call, and a netlink request is worked off before the call
returns, whenever the signal comes. So who is killed after each of them has been killed everywhere.
The target `changes` stands for all of them.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHANGES = "changes"
DIES = "dies as planned,"
_CHANGES = (
    "apagent.kernel.wire:Netlink._send_acknowledged",
    "apagent.kernel.sysctl:ensure",
)


def die(where: str) -> None:
    """End like after `kill -9`."""
    sys.stderr.write(f"{DIES} {where}\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def arm(plan: Path) -> None:
    """Wrap what the plan says, and take it away as a sign of that."""
    when, number, target = plan.read_text(encoding="ascii").split()
    calls = itertools.count(1)
    for name in _CHANGES if target == CHANGES else (target,):
        _wrap(name, when, lambda: next(calls) == int(number))
    plan.unlink()


def _wrap(target: str, when: str, is_its_turn: Callable[[], bool]) -> None:
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner: Any = functools.reduce(getattr, owners, importlib.import_module(module))
    wrapped = getattr(owner, name)

    @functools.wraps(wrapped)
    def call(*args: Any, **keywords: Any) -> Any:
        mine = is_its_turn()
        if mine and when == "before":
            die(f"{when} {target}")
        result = wrapped(*args, **keywords)
        if mine:
            die(f"{when} {target}")
        return result

    @functools.wraps(wrapped)
    async def call_async(*args: Any, **keywords: Any) -> Any:
        mine = is_its_turn()
        if mine and when == "before":
            die(f"{when} {target}")
        result = await wrapped(*args, **keywords)
        if mine:
            die(f"{when} {target}")
        return result

    setattr(owner, name, call_async if inspect.iscoroutinefunction(wrapped) else call)


def main() -> int:
    plan = Path(sys.argv[1])
    signal.signal(signal.SIGUSR1, lambda *_: arm(plan))
    from apagent.cli import agent  # noqa: PLC0415 - SIGUSR1 ends who isn't ready for it

    if plan.exists():
        arm(plan)
    return agent.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
