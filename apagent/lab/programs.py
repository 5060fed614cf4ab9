"""Programs that run in a lab's nodes: where ours are, what they find around them."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apagent.lab import namespaces

SOCKET_VARIABLE = "APAGENT_SOCKET"
"""Tells apctl which agent to speak to."""


def path(name: str) -> str:
    """One of our own programs, from the installation that this lab runs from."""
    return str(Path(sysconfig.get_path("scripts")) / name)


def environment(control_socket: Path | None) -> dict[str, str]:
    """Ours, with our programs first in PATH, and the AP's control socket for apctl."""
    result = dict(os.environ)
    result["PATH"] = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", "")))
    result.pop(SOCKET_VARIABLE, None)
    if control_socket is not None:
        result[SOCKET_VARIABLE] = str(control_socket)
    return result


def start(namespace: str, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:  # noqa: ANN401 - Popen's own
    """Start a program in a namespace: a child is made in the namespace of the thread that makes it.

    `options` are subprocess.Popen's.
    """
    with namespaces.inside(namespace):
        return subprocess.Popen(argv, **options)
