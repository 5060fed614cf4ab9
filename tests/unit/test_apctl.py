"""The apctl command against a real management service with a fake agent behind it."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import grpc
import pytest

from apagent import __version__
from apagent.cli.apctl import main
from apagent.cli.exit_codes import ExitCode
from apagent.control.server import ControlServer
from apagent.control.views import AgentEventView
from tests.fakes.control import CLIENT, FLOWS, STATUS, FakeBackend

PATIENCE_S = 10.0
HANG_S = "0.2"


_COMMAND = (
    sys.executable,
    "-c",
    "import sys; from apagent.cli.apctl import main; sys.exit(main())",
)


class Ran(NamedTuple):
    """What a run of apctl gave."""

    code: int
    out: str
    err: str


class Service:
    """A management service on a loop of its own, in another thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.backend = FakeBackend()
        self._ready: Future[None] = Future()
        self._thread = Thread(target=lambda: asyncio.run(self._serve()), name="service")

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        server = ControlServer(self.backend, self.path)
        await server.start()
        self._ready.set_result(None)
        await self._over.wait()
        await server.stop()

    def start(self) -> None:
        self._thread.start()
        self._ready.result(PATIENCE_S)

    def stop(self) -> None:
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self._over.set)
        self._thread.join(PATIENCE_S)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path / "control.sock")
    service.start()
    yield service
    service.stop()


@pytest.fixture
def apctl(service: Service, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    def run(*argv: str) -> Ran:
        try:
            code = main(["--socket", str(service.path), *argv])
        except SystemExit as leave:
            code = int(leave.code or 0)
        return Ran(code, *capsys.readouterr())

    return run


@contextmanager
def program(service: Service, *argv: str) -> Iterator[subprocess.Popen[str]]:
    """The command as a process of its own; Ctrl-C reaches it, whoever started the tests."""
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from apagent.cli.apctl import main; sys.exit(main())"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, "--socket", str(service.path), *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_status_as_a_table(apctl: Callable[..., Ran]) -> None:
    ran = apctl("status")
    assert (ran.code, ran.err) == (0, "")
    rows = dict(line.split("  ", 1) for line in ran.out.splitlines())
    assert rows["AP"].strip() == "ap1"
    assert rows["uptime"].strip() == "1h2m"
    assert rows["sessions"].strip() == "2 own, 1099511627776 of peers"


def test_status_as_json_has_every_field_by_its_name(apctl: Callable[..., Ran]) -> None:
    ran = apctl("status", "-o", "json")
    status = json.loads(ran.out)
    assert set(status) == set(STATUS.__slots__)
    assert status["peer_sessions"] == 1 << 40
    assert status["in_sync"] is True
    assert status["degraded"] == []
    assert status["networks"][0]["client_interface"] == "br-lan"


@pytest.mark.parametrize("trouble", [{"in_sync": False}, {"degraded": ("nft is gone",)}])
def test_status_tells_trouble_by_its_exit_code(
    service: Service, apctl: Callable[..., Ran], trouble: dict[str, Any]
) -> None:
    service.backend.degrade(**trouble)
    ran = apctl("status")
    assert ran.code == ExitCode.DEGRADED
    assert "nft is gone" in ran.out or "in sync" in ran.out


def test_a_drain_is_waited_for_and_says_how_far_it_is(
    apctl: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apagent.cli.drain_verbs.POLL_S", 0.01)
    ran = apctl("drain", "ap1", "--wait", "-o", "json")
    (anchor,) = json.loads(ran.out)
    assert (ran.code, anchor["mode"], anchor["flows"], anchor["deputy"]) == (
        0,
        "draining",
        0,
        "ap2",
    )
    assert ran.err == "1 flows left\n"


def test_a_drain_that_takes_too_long_goes_on(service: Service, apctl: Callable[..., Ran]) -> None:
    service.backend.drains = 1000
    ran = apctl("drain", "--wait", "--timeout", "0.2")
    assert ran.code == ExitCode.UNFINISHED
    assert "draining" in ran.out
    assert "active" in apctl("undrain").out


def test_another_aps_drain_is_refused(apctl: Callable[..., Ran]) -> None:
    ran = apctl("drain", "ap2")
    assert ran.code == ExitCode.USAGE
    assert "this is the agent of ap1" in ran.err


def test_what_has_no_address_that_moves_can_reclaim_none(apctl: Callable[..., Ran]) -> None:
    assert apctl("reclaim").code == ExitCode.USAGE


def test_lists_are_json_lists_and_jsonl_lines(apctl: Callable[..., Ran]) -> None:
    for verb, count in (("peers", 1), ("clients", 1), ("flows", 2)):
        as_list = json.loads(apctl(verb, "-o", "json").out)
        as_lines = [json.loads(line) for line in apctl("-o", "jsonl", verb).out.splitlines()]
        assert as_list == as_lines
        assert len(as_list) == count


def test_an_empty_list_is_a_list(apctl: Callable[..., Ran]) -> None:
    assert json.loads(apctl("flows", "--protocol", "udp", "-o", "json").out) == []
    assert apctl("flows", "--protocol", "udp", "-o", "jsonl").out == ""
    assert apctl("flows", "--protocol", "udp").out.startswith("PROTOCOL")


def test_keys_of_flows_and_peers_are_stable(apctl: Callable[..., Ran]) -> None:
    flow = json.loads(apctl("flows", "-o", "json").out)[0]
    assert flow == {name: getattr(FLOWS[0], name) for name in FLOWS[0].__slots__}
    peer = json.loads(apctl("peers", "-o", "json").out)[0]
    assert (peer["id"], peer["state"], peer["epoch"]) == ("ap2", "in-sync", (1 << 56) - 1)


def test_tables_are_aligned(apctl: Callable[..., Ran]) -> None:
    head, tcp, icmp = apctl("flows").out.splitlines()
    for column, cells in (
        ("REMOTE", ("198.51.100.10:443", "198.51.100.10 ")),
        ("ANCHOR", ("ap2", "ap1")),
    ):
        at = head.index(column)
        assert tcp[at:].startswith(cells[0])
        assert icmp[at:].startswith(cells[1])


def test_flows_of_a_client_in_another_notation(apctl: Callable[..., Ran]) -> None:
    ran = apctl("flows", "--client", "0200.5E10.0001", "--anchor", "ap1", "-o", "json")
    assert [flow["protocol"] for flow in json.loads(ran.out)] == ["icmp"]


def test_a_client_is_shown_with_its_roams(apctl: Callable[..., Ran]) -> None:
    shown = json.loads(apctl("client", "show", "10.77.0.5", "-o", "json").out)
    assert shown["flows_by_anchor"] == {"ap1": 2, "ap2": 1}
    assert shown["roams"][0]["flows_kept"] == 3
    table = apctl("client", "show", CLIENT.mac).out
    assert "ap1: 2, ap2: 1" in table
    assert "FLOWS KEPT" in table


def test_a_client_that_nobody_has_seen(apctl: Callable[..., Ran]) -> None:
    ran = apctl("client", "show", "02:00:00:00:00:99")
    assert ran == (5, "", "apctl: no AP has seen client 02:00:00:00:00:99\n")


def test_associate_says_what_a_source_would(service: Service, apctl: Callable[..., Ran]) -> None:
    ran = apctl("client", "associate", "02-00-5e-10-00-77", "--address", "10.77.0.9", "-o", "json")
    assert json.loads(ran.out)["mac"] == "02:00:5e:10:00:77"
    ((mac, address, network),) = service.backend.associated
    assert (mac, str(address), network) == ("02:00:5e:10:00:77", "10.77.0.9", None)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ((), "VERB"),
        (("client",), "ACTION"),
        (("client", "show", "client1"), "neither a MAC address nor an IPv4 address"),
        (("client", "associate", "10.77.0.5"), "no MAC address"),
        (("client", "associate", CLIENT.mac, "--network", "guest"), "there is: lan"),
        (("flows", "--protocol", "gre"), "invalid choice"),
        (("status", "-o", "xml"), "one of table, json, jsonl"),
        (("status", "--timeout", "0"), "above 0"),
        (("status", "--timeout", "1e300"), "up to 1000000"),
        (("client", "associate", "00:00:00:00:00:00"), "no client's address"),
        (("flows", "--anchor", "\udcff"), "is not UTF-8 text"),
        (("drain", "ap\udcff"), "is not UTF-8 text"),
    ],
)
def test_usage_errors(apctl: Callable[..., Ran], argv: tuple[str, ...], says: str) -> None:
    ran = apctl(*argv)
    assert (ran.code, ran.out) == (ExitCode.USAGE, "")
    assert says in ran.err


def test_no_agent_is_told_with_the_socket_and_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "none.sock"
    monkeypatch.setenv("APAGENT_SOCKET", str(path))
    assert main(["peers"]) == ExitCode.UNREACHABLE
    out, err = capsys.readouterr()
    assert out == ""
    assert str(path) in err
    assert "apagent run" in err


def test_what_is_no_socket_is_called_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file"):
        assert main(["--socket", str(path), "peers"]) == ExitCode.UNREACHABLE
        assert "that is no socket" in capsys.readouterr().err


def test_an_agent_that_does_not_know_the_verb_is_of_another_release(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    path = tmp_path / "old.sock"
    server.add_insecure_port(f"unix:{path}")
    server.start()
    assert main(["--socket", str(path), "reclaim"]) == ExitCode.ERROR
    assert server.stop(None).wait(PATIENCE_S)
    assert "doesn't know this verb: restart it" in capsys.readouterr().err


def test_what_must_wait_for_sync_is_told_like_a_status(
    service: Service, apctl: Callable[..., Ran]
) -> None:
    service.backend.degrade(in_sync=False)
    ran = apctl("client", "associate", CLIENT.mac, "-o", "json")
    assert ran == (ExitCode.DEGRADED, "", "apctl: the agent is not in sync yet\n")
    assert service.backend.associated == []


@pytest.mark.parametrize("verb", [("status",), ("peers", "-o", "json"), ("flows", "-o", "jsonl")])
def test_output_that_can_not_be_written_is_told(service: Service, verb: tuple[str, ...]) -> None:
    argv = [*_COMMAND, "--socket", str(service.path), *verb]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    said = "apctl: the output can't be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (ExitCode.ERROR, said)


def test_a_verb_is_done_where_its_streams_are_closed(service: Service) -> None:
    argv = [*_COMMAND, "--socket", str(service.path), "client", "associate", CLIENT.mac]
    done = subprocess.run(["sh", "-c", '"$@" >&- 2>&-', "sh", *argv], check=False)
    assert done.returncode == ExitCode.OK
    assert len(service.backend.associated) == 1


def test_an_agent_that_hangs_is_given_up(
    service: Service, apctl: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: Future[None] = Future()
    service.loop.call_soon_threadsafe(held.result)
    ran = apctl("status", "--timeout", HANG_S)
    held.set_result(None)
    assert ran.code == ExitCode.UNREACHABLE
    assert "did not answer within 0.2 s" in ran.err


def test_version_needs_no_agent(apctl: Callable[..., Ran], capsys: Any) -> None:
    with_agent = json.loads(apctl("version", "-o", "json").out)
    assert with_agent == {"apctl": __version__, "agent": STATUS.version}
    assert main(["--socket", "/nonexistent", "version"]) == ExitCode.OK
    assert "not reachable" in capsys.readouterr().out


def test_help_has_examples(apctl: Callable[..., Ran]) -> None:
    for verb in ("status", "peers", "clients", "flows", "watch", "version"):
        ran = apctl(verb, "--help")
        assert ran.code == ExitCode.OK
        assert f"  apctl {verb}" in ran.out


@pytest.mark.parametrize("output", ["table", "json", "jsonl"])
def test_watch_prints_events_until_interrupted(service: Service, output: str) -> None:
    seen = AgentEventView(1_700_000_000.5, "roam", "client roamed", {"to": "ap2"})
    service.backend.on_watch = lambda: service.backend.watchers[0][0](seen)
    with program(service, "watch", "-o", output) as watch:
        assert watch.stdout is not None
        line = watch.stdout.readline()
        watch.send_signal(signal.SIGINT)
        rest, err = watch.communicate(timeout=PATIENCE_S)
    assert (watch.returncode, rest, err) == (0, "", "")
    if output == "table":
        assert line.endswith("roam         client roamed\n")
    else:
        event = json.loads(line)
        assert event["fields"] == {"to": "ap2"}
        assert event["kind"] == "roam"


def test_watch_ends_with_the_agent(service: Service) -> None:
    watching: Future[None] = Future()
    service.backend.on_watch = lambda: watching.set_result(None)
    with program(service, "watch") as watch:
        watching.result(PATIENCE_S)
        service.stop()
        out, err = watch.communicate(timeout=PATIENCE_S)
    assert (watch.returncode, out) == (ExitCode.UNREACHABLE, "")
    assert f"the agent on {service.path} went away" in err


def test_a_reader_that_has_enough_is_no_error(service: Service) -> None:
    service.backend.all_flows = FLOWS * 20_000
    with program(service, "flows", "-o", "jsonl") as listing:
        assert listing.stdout is not None
        assert json.loads(listing.stdout.readline())["client"] == "10.77.0.5"
        listing.stdout.close()
        assert listing.stderr is not None
        assert listing.stderr.read() == ""
        assert listing.wait(PATIENCE_S) == ExitCode.OK
