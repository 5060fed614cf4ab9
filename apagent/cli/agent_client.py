"""A connection to the agent's management socket, and the ways in which it fails."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import grpc

from apagent.cli.exit_codes import ExitCode
from apagent.v1 import control_pb2_grpc

_ANSWERS = {
    grpc.StatusCode.NOT_FOUND: ExitCode.NOT_FOUND,
    grpc.StatusCode.INVALID_ARGUMENT: ExitCode.USAGE,
    grpc.StatusCode.FAILED_PRECONDITION: ExitCode.DEGRADED,
}
"""How the agent refuses on purpose: its own words say why."""


class CallFailed(Exception):
    """The call brought no answer; the text says why, `exit_code` what to exit with."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


@contextmanager
def agent(path: Path, timeout_s: float) -> Iterator[control_pb2_grpc.ControlStub]:
    """The agent that listens on `path`. Raises CallFailed for it, and for calls in the block."""
    _probe(path, timeout_s)
    with grpc.insecure_channel(f"unix:{path.absolute()}") as channel:
        try:
            yield control_pb2_grpc.ControlStub(channel)
        except grpc.RpcError as error:
            raise _failure(error, path, timeout_s) from error


def _probe(path: Path, timeout_s: float) -> None:
    """Connect once: the kernel's answer says more than gRPC would."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(timeout_s)
        try:
            probe.connect(str(path))
        except OSError as error:
            raise CallFailed(_why_unreachable(path, error), ExitCode.UNREACHABLE) from error


def _why_unreachable(path: Path, error: OSError) -> str:
    if error.errno == errno.EACCES:
        return f"may not use {path}: run this as the user that the agent runs as (root)"
    reason = {
        errno.ENOENT: "there is no such socket",
        errno.ECONNREFUSED: "nobody listens there" if path.is_socket() else "that is no socket",
    }.get(error.errno or 0, str(error))
    return (
        f"no agent on {path}: {reason}. Start it with `apagent run` (or `systemctl start "
        "apagent`), or name its socket with --socket"
    )


def _failure(error: grpc.RpcError, path: Path, timeout_s: float) -> CallFailed:
    call = cast(grpc.Call, error)  # as every error of a call is
    code, details = call.code(), call.details() or ""
    if code in _ANSWERS:
        return CallFailed(details, _ANSWERS[code])
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return CallFailed(
            f"the agent on {path} doesn't know this verb: restart it, if it is of an earlier "
            "release (see `apctl version`)",
            ExitCode.ERROR,
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return CallFailed(
            f"the agent on {path} did not answer within {timeout_s:g} s (see --timeout)",
            ExitCode.UNREACHABLE,
        )
    if code is grpc.StatusCode.UNAVAILABLE:
        return CallFailed(f"the agent on {path} went away: {details}", ExitCode.UNREACHABLE)
    return CallFailed(f"the agent failed: {code.name}: {details}", ExitCode.ERROR)
