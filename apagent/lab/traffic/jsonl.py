"""JSON lines on stdout: what the traffic programs report with."""

from __future__ import annotations

import json
import sys


def emit(event: str, **fields: object) -> None:
    """Write one event and flush it, so that a reader sees it at once."""
    sys.stdout.write(json.dumps({"event": event, **fields}, separators=(",", ":")) + "\n")
    sys.stdout.flush()
