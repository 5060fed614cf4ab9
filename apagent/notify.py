"""Telling the service manager how we are (sd_notify(3)); without one, nothing happens."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping

_MICROSECONDS = 1e6


def notify(state: str) -> None:
    """Send `state`, such as "READY=1", to the socket in NOTIFY_SOCKET, if there is one.

    Never waits: a service manager that doesn't listen is no reason to stand still.
    """
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return
    address = "\0" + path[1:] if path[0] == "@" else path
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.settimeout(0)
        channel.sendto(state.encode(), address)


def watchdog_period_s(environment: Mapping[str, str], pid: int) -> float | None:
    """How often we must say that we live, by WATCHDOG_USEC (sd_watchdog_enabled(3)).

    None: nobody watches, or the watch is on another process than `pid`.
    """
    period, watched = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
    if not period.isdecimal() or int(period) == 0 or watched not in ("", str(pid)):
        return None
    return int(period) / _MICROSECONDS
