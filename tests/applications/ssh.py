"""ssh with a forwarded port, through which a download runs."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.applications import http
from tests.applications.application import (
    SERVER,
    START_S,
    Figures,
    Roam,
    Scene,
    require_equal,
    require_running,
    unused_port,
)


class Ssh:
    """A running ssh, and the download through its port."""

    def __init__(
        self, client: subprocess.Popen[Any], log: Path, download: http.Download, seen_from: str
    ) -> None:
        self._client = client
        self._log = log
        self._download = download
        self._seen_from = seen_from

    def check(self) -> None:
        """Raise Broken if ssh or the download has ended."""
        require_running(self._client, "ssh")
        self._download.check()

    def roamed(self, roam: Roam) -> None:
        """Nothing to do."""

    def finish(self, roams: Sequence[Roam]) -> Figures:
        """The download has to end well, with ssh still there, which logged in once."""
        self.check()
        figures = self._download.finish(roams)
        require_running(self._client, "ssh")
        logins = re.findall(r"Accepted publickey for \S+ from (\S+)", self._log.read_text())
        require_equal("the addresses that logged in", logins, [self._seen_from])
        return figures


@contextlib.contextmanager
def forwarded_download(scene: Scene, rate_mbit: float = 10.0) -> Iterator[Ssh]:
    """A download by curl through a port that ssh forwards."""
    near, far = unused_port(), unused_port()
    home = scene.anchor()
    with contextlib.ExitStack() as stack:
        web = stack.enter_context(http.server(scene, rate_mbit))
        log = stack.enter_context(_sshd(scene, far))
        argv = _ssh(scene.directory, far, f"{near}:{SERVER}:{web.port}")
        ssh = stack.enter_context(scene.process(scene.client, argv))
        scene.wait_until_listening(scene.client, near)
        transfer = http.download_from(scene, web, "1.1", f"127.0.0.1:{near}", SERVER)
        yield Ssh(ssh, log, stack.enter_context(transfer), home)


@contextlib.contextmanager
def _sshd(scene: Scene, port: int) -> Iterator[Path]:
    """An sshd with keys of its own; its log."""
    directory = scene.directory
    for name in ("host", "user"):
        argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)]
        subprocess.run(argv, check=True, timeout=START_S)
    config, log = directory / "sshd_config", directory / "sshd.log"
    config.write_text(
        f"Port {port}\nHostKey {directory}/host\nAuthorizedKeysFile {directory}/user.pub\n"
        "PidFile none\nStrictModes no\nUsePAM no\n"
    )
    argv = [*_account()[1], _sshd_path(), "-De", "-f", str(config)]
    with log.open("w") as file, scene.process("server", argv, stderr=file):
        scene.wait_until_listening("server", port)
        yield log


def _account() -> tuple[pwd.struct_passwd, list[str]]:
    """An account to log in as, and what comes before sshd on its command line.

    It runs nothing, for the client asks for the port only. In a user namespace sshd can't become
    another user, so it is that user from the start. In an ordinary user's namespace it can't read
    the passwords either, so that every account counts as locked; without any, none does.
    """
    if Path("/proc/self/setgroups").read_text().strip() == "allow":
        nobody = pwd.getpwnam("nobody")
        return nobody, ["unshare", "--user", f"--map-user={nobody.pw_uid}"]
    shells = Path("/etc/shells").read_text().split()
    user = next(user for user in pwd.getpwall() if user.pw_uid and user.pw_shell in shells)
    become = f"unshare --user --map-user={user.pw_uid} --map-group={user.pw_gid}"
    script = f'mount --bind /dev/null /etc/shadow && exec {become} "$@"'
    return user, ["unshare", "--mount", "sh", "-c", script, "sh"]


def _sshd_path() -> str:
    """Where sshd is: it insists on being called by its full path."""
    places = (*os.environ["PATH"].split(os.pathsep), "/usr/sbin", "/sbin")
    return next(path for place in places if os.access(path := f"{place}/sshd", os.X_OK))


def _ssh(directory: Path, port: int, forward: str) -> list[str]:
    options = (
        "StrictHostKeyChecking=no",
        "UserKnownHostsFile=/dev/null",
        "LogLevel=ERROR",
        "AddressFamily=inet",
        "ExitOnForwardFailure=yes",
        "ServerAliveInterval=1",
        "ServerAliveCountMax=3",
    )
    chosen = [part for option in options for part in ("-o", option)]
    key, target = str(directory / "user"), f"{_account()[0].pw_name}@{SERVER}"
    return ["ssh", "-F", "none", "-NT", "-p", str(port), "-i", key, *chosen, "-L", forward, target]
