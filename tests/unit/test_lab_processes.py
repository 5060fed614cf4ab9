"""Processes known by id and start time."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from apagent.lab.processes import Process, stop

PATIENCE_S = 10.0


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as child:
        yield child
        child.kill()


def process(child: subprocess.Popen[bytes]) -> Process:
    found = Process.of(child.pid)
    assert found is not None
    return found


def test_a_running_process_is_alive(child: subprocess.Popen[bytes]) -> None:
    assert process(child).alive
    assert not process(child).wait(0)


def test_it_can_be_saved_and_loaded(child: subprocess.Popen[bytes], tmp_path: Path) -> None:
    process(child).save(tmp_path / "pid")
    assert Process.load(tmp_path / "pid") == process(child)


@pytest.mark.parametrize("text", ["", "12", "12 x\n", "a b\n"])
def test_an_incomplete_pid_file_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "pid").write_text(text)
    assert Process.load(tmp_path / "pid") is None
    assert Process.load(tmp_path / "absent") is None


def test_a_signal_reaches_it(child: subprocess.Popen[bytes]) -> None:
    found = process(child)
    assert found.signal(signal.SIGTERM)
    assert found.wait(PATIENCE_S)
    assert not found.alive  # a zombie now
    assert not found.signal(signal.SIGTERM)
    assert child.wait() == -signal.SIGTERM


def test_another_process_with_the_same_id_is_spared(child: subprocess.Popen[bytes]) -> None:
    recycled = Process(child.pid, process(child).started - 1)
    assert not recycled.alive
    assert recycled.wait(0)
    stop([recycled], PATIENCE_S)
    assert child.poll() is None


def test_stop_ends_several(child: subprocess.Popen[bytes]) -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        stop([process(child), process(other)], PATIENCE_S)
        assert other.wait() == -signal.SIGTERM
    assert child.wait() == -signal.SIGTERM


def test_what_ignores_the_request_is_killed() -> None:
    program = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "print('ready', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as stubborn:
        assert stubborn.stdout is not None
        stubborn.stdout.readline()
        stop([process(stubborn)], patience_s=0.05)
        assert stubborn.wait() == -signal.SIGKILL


def test_no_such_process() -> None:
    assert Process.of(2**22 + 1) is None
    assert Process.of(os.getpid()) is not None
