"""For all tests: one in network namespaces fails where there can be none; it is never skipped."""

from __future__ import annotations

import fcntl
import functools
import platform
import shutil
import socket
import struct
import subprocess
from collections.abc import Generator

import pytest

NAMESPACE = ("unshare", "--net")
PROBE_TIMEOUT_S = 10.0

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1
"""netdevice(7); linux/sockios.h, linux/if.h."""
_IFREQ = struct.Struct("=16sH22x")
"""struct ifreq: name, flags; 40 bytes on 64-bit machines."""

NO_NAMESPACES = """\
This test needs network namespaces, and none can be made here ({reason}). What to do:
  - run `make test`, which enters a user namespace where that is needed, or run pytest as root;
  - where user namespaces are switched off: `sysctl -w user.max_user_namespaces=10000`, and on
    Debian `kernel.unprivileged_userns_clone=1`, on Ubuntu
    `kernel.apparmor_restrict_unprivileged_userns=0`;
  - in a container: give it CAP_SYS_ADMIN and CAP_NET_ADMIN, or run the tests outside of it."""

_CHAIN = "nft 'table inet pr { chain %s { %s; }; }'"
FEATURES = {
    "veth": "ip link add pr-a type veth peer name pr-b",
    "bridge": "ip link add pr-br type bridge",
    "vxlan": "ip link add pr-vx type vxlan id 1 dstport 4789",
    "nf_tables": "nft add table inet pr",
    "nft NAT": _CHAIN % ("n", "type nat hook postrouting priority 90; masquerade"),
    "conntrack": _CHAIN % ("c", "ct state new accept"),
    "notrack": _CHAIN % ("t", "type filter hook prerouting priority raw; notrack"),
    "nft reject": _CHAIN % ("r", "meta l4proto tcp reject with tcp reset"),
    "nflog": _CHAIN % ("l", "log group 77"),
    "policy routing": "ip rule add fwmark 1 lookup 77000",
}
"""What the data path is made of, and a command each that works only where the kernel has it."""


def _run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False
    )


@functools.cache
def why_no_namespaces() -> str:
    """Why network namespaces can't be made; an empty string: they can."""
    if shutil.which(NAMESPACE[0]) is None:
        return "the program unshare, of util-linux, is missing"
    probe = _run(*NAMESPACE, "true")
    return "" if probe.returncode == 0 else probe.stderr.strip()


def missing_features() -> list[str]:
    """The kernel features that the data path needs and this machine lacks."""
    script = "\n".join(
        f"{command} >/dev/null 2>&1 || echo {feature}" for feature, command in FEATURES.items()
    )
    return _run(*NAMESPACE, "sh", "-c", script).stdout.splitlines()


def _nft_version() -> str:
    if shutil.which("nft") is None:
        return "no nft"
    return _run("nft", "--version").stdout.partition(" (")[0].strip()


def pytest_sessionstart() -> None:
    """Take loopback up: it is down in the fresh namespace that `scripts/in-userns` makes."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        answer = fcntl.ioctl(any_socket, _SIOCGIFFLAGS, _IFREQ.pack(b"lo", 0))
        _, flags = _IFREQ.unpack(answer)
        if not flags & _IFF_UP:
            fcntl.ioctl(any_socket, _SIOCSIFFLAGS, _IFREQ.pack(b"lo", flags | _IFF_UP))


def pytest_report_header() -> str:
    kernel = f"kernel {platform.release()}, {_nft_version()}"
    if why_no_namespaces():
        return f"{kernel}, no network namespaces: {why_no_namespaces()}"
    return f"{kernel}, missing kernel features: {', '.join(missing_features()) or 'none'}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("netns") is not None and why_no_namespaces():
        pytest.fail(NO_NAMESPACES.format(reason=why_no_namespaces()), pytrace=False)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter,
) -> Generator[None, None, None]:
    """Say last how many tests ran in network namespaces: that none did is easily overlooked."""
    yield
    reports = [
        report
        for reports in terminalreporter.stats.values()
        for report in reports
        if isinstance(report, pytest.TestReport) and "netns" in report.keywords
    ]
    ran = {r.nodeid for r in reports if r.when == "call" and not r.skipped}
    skipped = {r.nodeid for r in reports if r.skipped}
    terminalreporter.write_line(
        f"{len(ran)} tests ran in network namespaces, {len(skipped)} were skipped there"
    )
