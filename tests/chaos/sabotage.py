"""An agent that is broken on purpose: it never installs what peers say of their sessions.

A run with it must fail, or the judge would excuse everything.
"""

from __future__ import annotations

import sys
from pathlib import Path

from apagent.cli import agent
from apagent.core import engine
from apagent.core.desired import NetworkDelta
from apagent.core.model import NetworkName


def command() -> list[str]:
    """What to run in the place of `apagent`."""
    return [sys.executable, str(Path(__file__))]


def _break() -> None:
    take = engine.Engine.take_deltas

    def forgetful(self: engine.Engine) -> dict[NetworkName, NetworkDelta]:
        deltas = take(self)
        for delta in deltas.values():
            delta.flows.clear()
            delta.sockets.clear()
        return deltas

    engine.Engine.take_deltas = forgetful  # type: ignore[method-assign]


if __name__ == "__main__":
    _break()
    sys.exit(agent.main())
