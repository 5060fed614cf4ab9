"""`apagent lab` as a user types it, and `scripts/in-userns` for a user who is not root."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from apagent.lab import programs
from apagent.lab.place import Place

pytestmark = pytest.mark.netns

Run = Callable[..., subprocess.CompletedProcess[str]]

IN_USERNS = Path(__file__).parents[2] / "scripts" / "in-userns"
TIMEOUT_S = 30


@pytest.fixture
def lab(place: Place) -> Run:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        argv = [programs.path("apagent"), "lab", *arguments]
        environment = os.environ | {"APAGENT_LAB_PREFIX": place.prefix}
        return subprocess.run(
            argv, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )

    return run


def test_a_whole_life(lab: Run, place: Place) -> None:
    up = lab("up", "--aps", "2", "--clients", "1", "--no-agents")
    assert (up.returncode, up.stdout) == (0, "")
    assert "building the network: 2 APs, 1 client\n" in up.stderr

    again = lab("up", "--no-agents")
    assert again.returncode == 1
    assert "`apagent lab down`" in again.stderr

    moved = json.loads(lab("roam", "client1", "ap2", "-o", "json").stdout)
    assert (moved["client"], moved["from"], moved["to"]) == ("client1", "ap1", "ap2")
    assert "client1: ap2 -> ap1, link up at " in lab("roam", "client1", "ap1", "--silent").stdout

    status = lab("status")
    assert status.returncode == 0
    assert place.namespace("client1") in status.stdout
    clients = json.loads(lab("status", "-o", "json").stdout)["clients"]
    assert [client["ap"] for client in clients] == ["ap1"]

    assert lab("down").returncode == 0
    assert lab("down").returncode == 0
    assert lab("status").returncode == 5


def test_exec(lab: Run, place: Place) -> None:
    assert lab("up", "--aps", "1", "--clients", "1", "--no-agents").returncode == 0
    assert lab("exec", "client1", "--", "sh", "-c", "exit 7").returncode == 7
    assert lab("exec", "client1", "sh", "-c", "exit 7").returncode == 7
    assert lab("exec", "client1", "--", "echo", "--", "-o", "json").stdout == "-- -o json\n"
    told = lab("exec", "ap1", "--", "sh", "-c", "echo $APAGENT_SOCKET; command -v apctl").stdout
    control_socket, apctl = told.split()
    assert control_socket == str(place.control_socket("ap1"))
    assert Path(apctl).samefile(programs.path("apctl"))
    unknown = lab("exec", "client2", "--", "true")
    assert unknown.returncode == 5
    assert "client1" in unknown.stderr
    assert lab("exec", "client1").returncode == 2
    missing = lab("exec", "client1", "--", "no-such-program")
    assert missing.returncode == 1
    assert "no-such-program can't be started" in missing.stderr
    assert lab("down").returncode == 0


def test_mistakes_are_explained(lab: Run) -> None:
    assert lab("up", "--aps", "0").returncode == 1
    assert lab("up", "--aps", "many").returncode == 2
    assert lab("roam", "client1", "ap1").returncode == 5
    assert lab().returncode == 2


def test_in_userns_runs_a_lab_without_privileges(place: Place) -> None:
    apagent = programs.path("apagent")
    life = (
        f"'{apagent}' lab up --aps 2 --clients 1 --no-agents && "
        f"'{apagent}' lab roam client1 ap2 --carrier && "
        f"'{apagent}' lab exec client1 -- ping -c1 -W2 198.51.100.10 && "
        f"'{apagent}' lab down && ls /run/netns"
    )
    done = subprocess.run(
        # Root without capabilities but the one that is needed to be root inside, too
        # (user_namespaces(7)): whoever runs the tests, `in-userns` has to make a namespace.
        ["setpriv", "--bounding-set=-all,+setfcap", "--inh-caps=-all", IN_USERNS, "sh", "-c", life],
        env=os.environ | {"APAGENT_LAB_PREFIX": place.prefix},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "1 received" in done.stdout
    assert not place.root.exists()


def test_in_userns_passes_arguments_and_exit_code() -> None:
    done = subprocess.run(
        [IN_USERNS, "sh", "-c", 'echo "$1"; exit 3', "sh", "a  b"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, "a  b\n")
    usage = subprocess.run([IN_USERNS], capture_output=True, text=True, check=False)
    assert usage.returncode == 2
