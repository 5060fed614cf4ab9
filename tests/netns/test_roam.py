"""Every kind of connection lives on while its client roams over all APs."""

from __future__ import annotations

import contextlib
import pwd
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from apagent.lab import namespaces
from apagent.lab.lab import Lab
from apagent.lab.measure import Arrivals, Echoes
from apagent.lab.traffic import content
from apagent.lab.traffic.running import Running, running, serving
from tests.netns.conftest import MakeLab
from tests.netns.observe import SERVER, agreed, eventually, served_by, sessions, uplink

pytestmark = pytest.mark.netns

PATH = ("ap2", "ap3", "ap1", "ap3", "ap2", "ap1")
DWELL_S = 0.3
START_S = 10.0
END_S = 30.0
SIZE = 16_000_000
RATE_MBIT = 20.0
"""Makes transfers that outlast the path."""


@pytest.fixture(scope="module")
def domain(module_lab: MakeLab) -> Lab:
    return module_lab(aps=3, clients=2)


@pytest.fixture(autouse=True)
def _at_home(domain: Lab) -> None:
    for client, ap in (("client1", "ap1"), ("client2", "ap2")):
        domain.roam(client, ap)
        served_by(domain, client, ap)


def roam_both(lab: Lab, busy: Callable[[], bool]) -> list[int]:
    """Let both clients roam along the path, one behind the other; when client1's link was up."""
    up = []
    for here, there in zip(PATH, (*PATH[1:], PATH[0]), strict=True):
        agreed(lab)
        assert busy()
        up.append(lab.roam("client1", here))
        lab.roam("client2", there)
        served_by(lab, "client1", here)
        served_by(lab, "client2", there)
        time.sleep(DWELL_S)
    return up


def transfer(lab: Lab, stack: contextlib.ExitStack, client: str, program: str) -> Running:
    options = ("--size", SIZE, "--rate-mbit", RATE_MBIT)
    started = stack.enter_context(running(lab, client, program, SERVER, *options))
    assert started.wait_for("connected", START_S)["address"] in (uplink("ap1"), uplink("ap2"))
    return started


@contextlib.contextmanager
def pings_at_the_server(lab: Lab) -> Iterator[Callable[[], set[str]]]:
    """The source addresses of the echo requests that the server gets."""
    with namespaces.inside(lab.namespace("server")):
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    with raw:
        raw.setblocking(False)

        def sources() -> set[str]:
            seen = set()
            with contextlib.suppress(BlockingIOError):
                while True:
                    seen.add(str(IPv4Address(raw.recv(100)[12:16])))
            return seen

        yield sources


def test_transfers_terminals_datagrams_and_pings_live_on(
    domain: Lab, record_property: Callable[[str, object], None]
) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(domain))
        pinged_from = stack.enter_context(pings_at_the_server(domain))
        download = transfer(domain, stack, "client1", "download")
        other = transfer(domain, stack, "client2", "download")
        upload = transfer(domain, stack, "client1", "upload")
        terminal = stack.enter_context(
            running(domain, "client1", "lines", SERVER, "--count", 160, "--interval-ms", 40)
        )
        echo = stack.enter_context(running(domain, "client1", "echo", SERVER, "--rate", 200))
        ping = stack.enter_context(
            domain.popen("client1", ["ping", "-i0.02", SERVER], stdout=subprocess.PIPE, text=True)
        )
        echo.wait_for("started", START_S)
        terminal.wait_for("line", START_S)

        up = roam_both(domain, lambda: not (download.wait_ended(0) or upload.wait_ended(0)))

        ping.send_signal(signal.SIGINT)
        echo.stop()
        for program in (download, other, upload):
            result = program.result(END_S)
            assert (result["completed"], result["sha256_match"]) == (True, True), result
        line_result = terminal.result(END_S)
        assert line_result["completed"], line_result
        assert line_result["echoed"] == 160
        echoed = echo.result(END_S)
        assert echoed["sources"] == [echoed["sources"][0]]
        assert echoed["sources"][0].startswith(uplink("ap1") + ":")
        assert echoed["lost"] < 0.05 * echoed["sent"]
        lost = float(re.findall(r"([\d.]+)% packet loss", ping.communicate(timeout=END_S)[0])[0])
        assert lost < 5
        assert pinged_from() == {uplink("ap1")}
        peers = [(e["service"], e["address"]) for e in server.events if e["event"] == "peer"]
        assert sorted(peers) == sorted(
            [("download", uplink("ap2"))]
            + [(name, uplink("ap1")) for name in ("download", "upload", "lines", "echo")]
        )

    arrivals, echoes = Arrivals.of(download.events), Echoes.of(echo.events)
    record_property("download_interruptions_ms", _ms(arrivals.interruption_ns, up))
    record_property("echo_interruptions_ms", _ms(echoes.interruption_ns, up))
    record_property("terminal_longest_ms", line_result["max_latency_us"] / 1e3)
    record_property("echoes_lost", f"{echoed['lost']} of {echoed['sent']}")
    record_property("pings_lost_percent", lost)


def _ms(interruption_ns: Callable[[int], int | None], up: list[int]) -> list[float | None]:
    found = map(interruption_ns, up)
    return [None if gap is None else round(gap / 1e6, 1) for gap in found]


def test_curl_and_ssh_live_on(domain: Lab, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"".join(content.pieces(7, SIZE, SIZE)))
    with (
        http_server(domain, tmp_path) as log,
        sshd(domain, tmp_path) as ssh,
        domain.popen(
            "client1", ssh, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as terminal,
        domain.popen("client1", curl(tmp_path)) as download,
        domain.popen("client2", curl(tmp_path, "second")) as second,
    ):
        eventually(lambda: (tmp_path / "second").exists() and (tmp_path / "first").exists())
        eventually(lambda: {s.remote_port for s in sessions(domain, "ap3")} >= {2222, 8080})
        roam_both(domain, lambda: (download.poll(), terminal.poll()) == (None, None))
        assert download.wait(END_S) == 0
        assert second.wait(END_S) == 0
        output, errors = terminal.communicate(timeout=END_S)
        assert (terminal.returncode, output.split()) == (0, [str(i) for i in range(LINES)]), errors
        for name in ("first", "second"):
            assert (tmp_path / name).read_bytes() == (tmp_path / "file").read_bytes()
        assert sorted(
            line.split()[0] for line in log.read_text().splitlines() if "GET" in line
        ) == [
            uplink("ap1"),
            uplink("ap2"),
        ]


LINES = 65


def curl(directory: Path, name: str = "first") -> list[str]:
    limit = str(SIZE // 7)  # bytes a second
    url = f"http://{SERVER}:8080/file"
    return ["curl", "-sS", "--limit-rate", limit, "-o", str(directory / name), url]


@contextlib.contextmanager
def http_server(lab: Lab, directory: Path) -> Iterator[Path]:
    log = directory / "http.log"
    argv = [sys.executable, "-u", "-m", "http.server", "8080", "-d", str(directory)]
    with log.open("w") as file, lab.popen("server", argv, stdout=file, stderr=file) as server:
        try:
            eventually(lambda: _listens(lab, 8080))
            yield log
        finally:
            server.terminate()


@contextlib.contextmanager
def sshd(lab: Lab, directory: Path) -> Iterator[list[str]]:
    """An sshd with keys of its own; a command that prints a number every 0.1 s over it."""
    user, before = _account()
    for name in ("host", "user"):
        argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)]
        subprocess.run(argv, check=True, timeout=START_S)
    settings = {
        "HostKey": directory / "host",
        "AuthorizedKeysFile": directory / "user.pub",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PermitRootLogin": "yes",
        "Port": 2222,
    }
    config = directory / "sshd_config"
    config.write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
    Path("/run/sshd").mkdir(exist_ok=True)
    argv = [*before, _program("sshd"), "-D", "-e", "-f", str(config)]
    with lab.popen("server", argv, stderr=subprocess.DEVNULL) as server:
        try:
            eventually(lambda: _listens(lab, 2222))
            yield _ssh(directory, user)
        finally:
            server.terminate()


def _account() -> tuple[str, list[str]]:
    """Whom to log in as, and what stands before sshd on its command line.

    In a user namespace sshd can't give up root's privileges (setgroups(2) is denied), so it runs as
    an ordinary user, which it becomes in a namespace of its own, and where no account is locked.
    """
    if Path("/proc/self/setgroups").read_text().strip() == "allow":
        return "root", []
    shells = Path("/etc/shells").read_text().split()
    user = next(user for user in pwd.getpwall() if user.pw_uid and user.pw_shell in shells)
    become = f"unshare --user --map-user={user.pw_uid} --map-group={user.pw_gid}"
    script = f'mount --bind /dev/null /etc/shadow && exec {become} "$@"'
    return user.pw_name, ["unshare", "--mount", "sh", "-c", script, "sh"]


def _ssh(directory: Path, user: str) -> list[str]:
    options = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR")
    chosen = [part for option in options for part in ("-o", option)]
    loop = f"for i in $(seq 0 {LINES - 1}); do echo $i; sleep 0.1; done"
    return [
        *("ssh", "-F", "none", "-p", "2222", "-i", str(directory / "user")),
        *chosen,
        f"{user}@{SERVER}",
        f"sh -c {shlex.quote(loop)}",
    ]


def _program(name: str) -> str:
    found = [Path(d, name) for d in ("/usr/sbin", "/sbin", "/usr/bin")]
    return str(next(path for path in found if path.exists()))


def _listens(lab: Lab, port: int) -> bool:
    return f":{port} " in lab.run("server", ["ss", "-Hltn"]).stdout
