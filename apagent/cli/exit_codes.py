"""Exit codes of apagent and apctl."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What a command's exit code means."""

    OK = 0
    ERROR = 1
    USAGE = 2
    """The command line is wrong (argparse's own code)."""
    UNREACHABLE = 3
    """No agent answers."""
    DEGRADED = 4
    """The agent answers and is degraded or not in sync; or a configuration is right where an
    interface is missing."""
    NOT_FOUND = 5
    UNFINISHED = 6
    """What was to be waited for hasn't happened in time; it goes on."""
    INTERRUPTED = 130
    """128 + SIGINT, as a shell would have it."""
