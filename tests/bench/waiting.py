"""Waiting for what will be so."""

from __future__ import annotations

import time
from collections.abc import Callable

from apagent.lab.errors import LabError

_PATIENCE_S = 60.0


def until(holds: Callable[[], bool], what: str) -> None:
    """Wait for it. Raises LabError."""
    deadline = time.monotonic() + _PATIENCE_S
    while not holds():
        if time.monotonic() > deadline:
            raise LabError(f"not within {_PATIENCE_S:g} s: {what}")
        time.sleep(0.02)
