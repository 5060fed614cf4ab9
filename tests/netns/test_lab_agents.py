"""How a lab starts, finds and ends its agents; a stand-in plays their part."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from apagent.lab import agents, programs
from apagent.lab.errors import LabError
from apagent.lab.lab import Lab
from apagent.lab.place import Place
from apagent.lab.processes import Process

pytestmark = pytest.mark.netns

_STAND_IN = f"""#!{sys.executable}
import os, pathlib, signal, socket, sys
directory = pathlib.Path(sys.argv[-1]).parent
print("called with", *sys.argv[1:], flush=True)
if (directory / "broken").exists():
    sys.exit("something is wrong with " + directory.name)
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
    channel.connect(os.environ["NOTIFY_SOCKET"])
    channel.send(b"STATUS=starting")
    if not (directory / "slow").exists():
        channel.send(b"STATUS=running\\nREADY=1")
signal.pause()
"""


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "stand-in"
    program.write_text(_STAND_IN)
    program.chmod(0o755)
    monkeypatch.setattr(programs, "path", lambda _: str(program))


@pytest.fixture
def lab(place: Place) -> Iterator[Lab]:
    with Lab(2, 0, place=place) as lab:
        yield lab


def test_every_ap_runs_an_agent_with_its_configuration(lab: Lab) -> None:
    assert lab.phase == "up"
    for ap in lab.aps:
        config = lab.place.root / ap / "agent.toml"
        assert lab.agents.log(ap).read_text() == f"called with run --config {config}\n"
        environment = Path(f"/proc/{lab.agent_pid(ap)}/environ").read_bytes().split(b"\0")
        assert f"APAGENT_SOCKET={lab.place.control_socket(ap)}".encode() in environment
    own = Path(f"/proc/{lab.agent_pid('ap1')}/ns/net").stat().st_ino
    assert str(own) in lab.run("ap1", ["stat", "-Lc", "%i", "/proc/self/ns/net"]).stdout


def test_an_agent_can_be_killed_and_started_again(lab: Lab) -> None:
    first = lab.agent_pid("ap1")
    with pytest.raises(LabError, match="the agent of ap1 runs already"):
        lab.start_agent("ap1")
    lab.kill_agent("ap1")
    with pytest.raises(LabError, match="the agent of ap1 doesn't run; the end of its log"):
        lab.agent_pid("ap1")
    lab.start_agent("ap1")
    assert lab.agent_pid("ap1") != first


def test_another_process_finds_them_and_may_start_them(lab: Lab) -> None:
    other = Lab.open(lab.place)
    assert other.agent_pid("ap1") == lab.agent_pid("ap1")
    other.kill_agent("ap1", signal.SIGTERM)
    other.start_agent("ap1")
    assert other.agent_pid("ap1") == lab.agent_pid("ap1")
    lab.kill_agent("ap1")
    other.agents.close()


def test_a_recycled_process_id_is_not_an_agent(lab: Lab) -> None:
    lab.kill_agent("ap1")
    me = Process.of(os.getpid())
    assert me is not None
    Process(me.pid, me.started + 1).save(lab.place.root / "ap1" / "agent.pid")
    assert lab.agents.process("ap1") is None


def test_an_agent_that_fails_takes_the_lab_down_and_says_why(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    _mark(monkeypatch, "ap2", "broken")
    with pytest.raises(LabError, match=r"the agent of ap2 has ended(?s:.*)something is wrong"):
        Lab(2, 0, place=place).up()
    assert not place.root.exists()


def test_waiting_for_an_agent_is_bounded(lab: Lab) -> None:
    lab.kill_agent("ap1")
    (lab.place.root / "ap1" / "slow").touch()
    lab.agents.start("ap1")
    with pytest.raises(LabError, match=r"the agent of ap1 is not ready in time(?s:.*)run"):
        lab.agents.wait_ready(["ap1"], timeout_s=0.3)


def _mark(monkeypatch: pytest.MonkeyPatch, ap: str, mark: str) -> None:
    original = agents.Agents.prepare

    def prepare(self: agents.Agents, name: str) -> None:
        original(self, name)
        if name == ap:
            self.config_file(name).with_name(mark).touch()

    monkeypatch.setattr(agents.Agents, "prepare", prepare)
