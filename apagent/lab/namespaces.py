"""Named network namespaces, laid out like `ip netns` does: files in /run/netns.

A thread enters a namespace by itself: its sockets and its children are made there, and the other
threads stay where they are. So a program is started in a namespace by starting it from there; no
helper program and no code between fork and exec is needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from apagent.lab.errors import LabError

DIRECTORY = Path("/run/netns")

_CLONE_NEWNET = 0x40000000
_MS_BIND = 0x1000
_MS_REC = 0x4000
_MS_SHARED = 1 << 20
_MNT_DETACH = 2
_MINE = "/proc/thread-self/ns/net"

_libc = ctypes.CDLL(None, use_errno=True)


def path(name: str) -> Path:
    """The file that stands for the namespace."""
    return DIRECTORY / name


def names() -> list[str]:
    """Names of all namespaces of this machine."""
    if not DIRECTORY.is_dir():
        return []
    return sorted(entry.name for entry in DIRECTORY.iterdir())


def identity(name: str) -> tuple[int, int]:
    """Device and inode of the namespace: what /proc/PID/ns/net says of a process inside."""
    stat = path(name).stat()
    return stat.st_dev, stat.st_ino


def create(name: str) -> None:
    """Make a namespace. Raises LabError."""
    _share_directory()
    file = path(name)
    try:
        file.touch(mode=0o444, exist_ok=False)
    except FileExistsError:
        raise LabError(
            f"the namespace {name} exists already; `ip netns del {name}` removes it"
        ) from None
    home = os.open(_MINE, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _unshare()
        try:
            _check(f"mounting {file}", _mount(_MINE, file, _MS_BIND))
        finally:
            _enter(home)
    finally:
        os.close(home)


def remove(name: str) -> None:
    """Remove a namespace, or the file that an interrupted `create` left. Absent: nothing to do.

    The kernel frees it when the last process inside has ended.
    """
    file = path(name)
    if _libc.umount2(os.fsencode(file), _MNT_DETACH) < 0:
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOENT):  # EINVAL: a plain file
            raise _fault(f"removing the namespace {name}", code)
    file.unlink(missing_ok=True)


@contextlib.contextmanager
def inside(name: str) -> Iterator[None]:
    """Be in the namespace, this thread only. Not to be held over an `await`. Raises LabError."""
    home = os.open(_MINE, os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter(name)
        try:
            yield
        finally:
            _enter(home)
    finally:
        os.close(home)


def enter(name: str) -> None:
    """Move this thread into the namespace for good. Raises LabError."""
    try:
        there = os.open(path(name), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise LabError(
            f"the namespace {name} is gone; `apagent lab down` clears the rest of the lab"
        ) from None
    try:
        _enter(there)
    finally:
        os.close(there)


def set_sysctl(name: str, value: int) -> None:
    """Set a `net.` sysctl (slashes for dots) of the namespace that this thread is in."""
    file = Path("/proc/sys/net") / name
    try:
        file.write_text(f"{value}\n", encoding="ascii")
    except OSError as error:
        raise LabError(
            f"{file} can't be written ({error.strerror}): is /proc read-only?"
        ) from error


def _share_directory() -> None:
    """Make /run/netns a shared mount, or other mount namespaces would keep what we unmount."""
    try:
        DIRECTORY.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise _fault(f"making {DIRECTORY}", error.errno or 0) from error
    if _mount("", DIRECTORY, _MS_SHARED | _MS_REC) == errno.EINVAL:  # not a mount point yet
        _check(f"mounting {DIRECTORY}", _mount(DIRECTORY, DIRECTORY, _MS_BIND | _MS_REC))
        _check(f"sharing {DIRECTORY}", _mount("", DIRECTORY, _MS_SHARED | _MS_REC))


def _mount(source: Path | str, target: Path, flags: int) -> int:
    """mount(2); returns the errno, or 0."""
    source_, target_ = os.fsencode(source), os.fsencode(target)
    result = _libc.mount(source_, target_, b"none", ctypes.c_ulong(flags), None)
    return ctypes.get_errno() if result < 0 else 0


def _enter(descriptor: int) -> None:
    result = _libc.setns(descriptor, _CLONE_NEWNET)
    _check("entering a network namespace", ctypes.get_errno() if result < 0 else 0)


def _unshare() -> None:
    result = _libc.unshare(_CLONE_NEWNET)
    _check("making a network namespace", ctypes.get_errno() if result < 0 else 0)


def _check(what: str, code: int) -> None:
    if code:
        raise _fault(what, code)


def _fault(what: str, code: int) -> LabError:
    text = f"{what}: {os.strerror(code)}"
    if code in (errno.EPERM, errno.EACCES):
        text += (
            "; the lab needs root, or a user namespace with a /run of its own: "
            "`scripts/in-userns COMMAND` makes one"
        )
    return LabError(text)
