"""The traffic programs over loopback, with tiny sizes, and the arithmetic inside them."""

from __future__ import annotations

import hashlib
import socket
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest

from apagent.lab.traffic.content import BLOCK, pieces, sha256
from apagent.lab.traffic.datagram import answer, read_answer, request
from apagent.lab.traffic.echo import Echoes, Gap
from apagent.lab.traffic.pace import Pace
from apagent.lab.traffic.running import Running, TrafficError, running

TIMEOUT_S = 10.0


class Loopback:
    """Starts programs right here; there is only one node."""

    def popen(self, node: str, argv: list[str], **kw: Any) -> subprocess.Popen[Any]:
        return subprocess.Popen(argv, **kw)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    options = ("--address", "127.0.0.1", "--any-port", "--for-s", 60)
    with running(Loopback(), "server", "serve", *options) as started:
        started.wait_for("listening", TIMEOUT_S)
        yield started


def ask(server: Running, program: str, *options: object) -> AbstractContextManager[Running]:
    port = server.wait_for("listening", TIMEOUT_S)["ports"][program]
    return running(Loopback(), "client1", program, "127.0.0.1", "--port", port, *options)


def test_content_depends_on_seed_and_size_but_not_on_the_pieces() -> None:
    size = BLOCK + 1000
    whole = b"".join(pieces(7, size, BLOCK))
    assert len(whole) == size
    assert whole == b"".join(pieces(7, size, 777))
    assert whole != b"".join(pieces(8, size, BLOCK))
    assert sha256(7, size) == hashlib.sha256(whole).hexdigest()


def test_pace_keeps_the_rate_and_does_not_catch_up_after_a_pause() -> None:
    pace = Pace(8)  # a megabyte a second
    assert pace.piece == 2000
    now = 100.0
    for _ in range(100):
        now += pace.delay(1000, now)
    assert now == pytest.approx(100.1, abs=0.011)
    after_pause = now + 60
    assert sum(pace.delay(1000, after_pause) for _ in range(100)) > 0.05


def test_without_a_rate_there_is_no_delay() -> None:
    assert Pace(0).delay(1_000_000, 5.0) == 0.0


def test_datagrams_say_which_sender_the_server_saw() -> None:
    data = answer(request(42), "203.0.113.11", 4711)
    assert read_answer(data) == (42, "203.0.113.11:4711")
    assert read_answer(data[:-1]) is None
    assert read_answer(b"x" * len(data)) is None


def test_gaps_are_runs_of_unanswered_requests() -> None:
    echoes = Echoes()
    for sequence in range(6):
        echoes.note_sent(100 + sequence)
    for sequence in (0, 3):
        echoes.note_received(sequence, "10.0.0.1:1", 200)
    assert echoes.gaps() == [Gap(1, 2, 101, 103), Gap(4, 2, 104, 0)]


def test_download_is_whole_and_every_receipt_is_logged(server: Running) -> None:
    with ask(server, "download", "--size", 200_000, "--rate-mbit", 80) as client:
        result = client.result(TIMEOUT_S)
    assert result["completed"]
    assert result["sha256_match"]
    connected = client.wait_for("connected", 0)
    assert connected["address"] == "127.0.0.1"
    arrivals = [event for event in client.events if event["event"] == "arrivals"]
    assert sum(sum(event["bytes"]) for event in arrivals) == 200_000
    assert all(len(event["bytes"]) == len(event["after_us"]) for event in arrivals)
    assert result["started_ns"] <= arrivals[0]["start_ns"] <= result["ended_ns"]


def test_the_server_reports_the_peer_that_it_sees(server: Running) -> None:
    with ask(server, "download", "--size", 1) as client:
        connected = client.wait_for("connected", TIMEOUT_S)
        client.result(TIMEOUT_S)
    seen = [
        event["port"]
        for event in server.events
        if event["event"] == "peer" and event["service"] == "download"
    ]
    assert connected["port"] in seen


def test_upload_is_confirmed_with_its_checksum(server: Running) -> None:
    with ask(server, "upload", "--size", 200_000, "--seed", 3) as client:
        result = client.result(TIMEOUT_S)
    assert result["completed"]
    assert result["sha256"] == sha256(3, 200_000)
    assert result["bytes"] == 200_000
    assert result["address"] == "127.0.0.1"


def test_lines_come_back_with_their_latency(server: Running) -> None:
    with ask(server, "lines", "--count", 5, "--interval-ms", 1) as client:
        result = client.result(TIMEOUT_S)
    assert result["echoed"] == 5
    assert [e["number"] for e in client.events if e["event"] == "line"] == [0, 1, 2, 3, 4]
    assert 0 < result["median_latency_us"] <= result["max_latency_us"]


def test_echo_counts_answers_and_knows_its_outside_address(server: Running) -> None:
    with ask(server, "echo", "--rate", 500, "--duration-s", 0.1) as client:
        result = client.result(TIMEOUT_S)
    assert (result["sent"], result["lost"], result["gaps"]) == (50, 0, [])
    [source] = result["sources"]
    assert source.startswith("127.0.0.1:")
    echoes = client.wait_for("echoes", 0)
    assert len(echoes["sent_us"]) == len(echoes["received_us"]) == 50


def test_echo_reports_when_it_is_told_to_stop(server: Running) -> None:
    with ask(server, "echo", "--duration-s", 60) as client:
        client.wait_for("started", TIMEOUT_S)
        client.stop()
        assert client.result(TIMEOUT_S)["lost"] == 0


def test_echo_without_a_server_loses_everything() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unanswered:
        unanswered.bind(("127.0.0.1", 0))
        options = ("127.0.0.1", "--port", unanswered.getsockname()[1], "--duration-s", 0.02)
        with running(Loopback(), "client1", "echo", *options) as client:
            result = client.result(TIMEOUT_S)
    assert result["lost"] == result["sent"] > 0
    assert result["gaps"][0]["to_ns"] == 0
    assert client.process.returncode == 1


def test_download_gives_up_on_a_silent_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        options = ("127.0.0.1", "--port", silent.getsockname()[1], "--stall-s", 0.05)
        with running(Loopback(), "client1", "download", *options) as client:
            result = client.result(TIMEOUT_S)
    assert not result["completed"]
    assert result["reason"] == "stalled: no progress for 0.05 s"
    assert client.process.returncode == 1


def test_download_says_that_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with running(Loopback(), "client1", "download", "127.0.0.1", "--port", port) as client:
        result = client.result(TIMEOUT_S)
    assert result["reason"].startswith(f"no connection to 127.0.0.1:{port}: ")


def test_waiting_for_what_never_comes_fails(server: Running) -> None:
    with (
        ask(server, "lines", "--count", 1) as client,
        pytest.raises(TrafficError, match="lines on client1 ended without the event 'never'"),
    ):
        client.wait_for("never", TIMEOUT_S)
