"""Sysctls of the current network namespace."""

from __future__ import annotations

from pathlib import Path

from apagent.errors import KernelFault

_ROOT = Path("/proc/sys")

Name = tuple[str, ...]
"""A sysctl's path under /proc/sys: an interface's name may hold dots, so parts are kept apart."""

IP_FORWARD: Name = ("net", "ipv4", "ip_forward")
TCP_LOOSE: Name = ("net", "netfilter", "nf_conntrack_tcp_loose")
CONNTRACK_EVENTS: Name = ("net", "netfilter", "nf_conntrack_events")


def interface(device: str, key: str) -> Name:
    """The IPv4 sysctl `key` of an interface (or of "all")."""
    return ("net", "ipv4", "conf", device, key)


def neighbour(device: str, key: str) -> Name:
    """The sysctl `key` of an interface's IPv4 neighbour table."""
    return ("net", "ipv4", "neigh", device, key)


def read(name: Name) -> int | None:
    """The value; None: this kernel doesn't have it."""
    try:
        return int(_ROOT.joinpath(*name).read_text())
    except FileNotFoundError:
        return None


def ensure(name: Name, value: int) -> str | None:
    """Make `name` be `value`; what was changed, "name: old -> new", or None: nothing.

    Raises KernelFault if it can't be written or doesn't exist.
    """
    before = read(name)
    if before == value:
        return None
    try:
        _ROOT.joinpath(*name).write_text(str(value))
    except OSError as error:
        text = f"setting {'.'.join(name)} to {value}: {error.strerror}; is /proc/sys read-only?"
        raise KernelFault(text, error.errno or 0) from None
    return f"{'.'.join(name)}: {before} -> {value}"
