"""The management service's unix socket: who may connect is a matter of its file mode."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from apagent.control.port import ControlBackend
from apagent.control.servicer import ControlServicer
from apagent.errors import NeedsError
from apagent.v1 import control_pb2_grpc

_DIRECTORY_MODE = 0o755
_SOCKET_UMASK = 0o177
"""Leaves mode 0600: management is for the user that the agent runs as."""
_PROBE_TIMEOUT_S = 1.0


class ControlServer:
    """Serves management on a unix socket."""

    def __init__(self, backend: ControlBackend, path: Path) -> None:
        self._path = path
        self._server = grpc.aio.server()
        control_pb2_grpc.add_ControlServicer_to_server(ControlServicer(backend), self._server)

    async def start(self) -> None:
        """Listen. Raises NeedsError where the socket can't be made, or another agent has it."""
        _make_way(self._path)
        try:
            with _umask(_SOCKET_UMASK):
                self._server.add_insecure_port(f"unix:{self._path}")
        except RuntimeError as error:
            raise NeedsError(
                f"control.socket: can't listen on {self._path}: can this user make a file there, "
                "and is the path short enough for a socket (100 characters)?"
            ) from error
        await self._server.start()

    async def stop(self) -> None:
        """End every call and remove the socket."""
        await self._server.stop(grace=None)


def _make_way(path: Path) -> None:
    """Make the directory, and remove a socket that a dead agent left."""
    try:
        path.parent.mkdir(_DIRECTORY_MODE, parents=True, exist_ok=True)
        if path.exists() and not path.is_socket():
            raise NeedsError(f"control.socket: {path} is there and no socket: move it away")
        if path.is_socket():
            if _somebody_answers(path):
                raise NeedsError(
                    f"control.socket: another agent answers on {path}: "
                    "stop it, or give this one a socket of its own"
                )
            path.unlink()
    except OSError as error:
        raise NeedsError(f"control.socket: can't use {path}: {error.strerror}") from error


def _somebody_answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_TIMEOUT_S)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except TimeoutError:
            return True
    return True


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
