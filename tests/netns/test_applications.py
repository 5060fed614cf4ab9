"""Real applications, each across ten roams over three APs, with nothing broken."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from apagent.lab.lab import Lab
from tests.applications import http, iperf, quic, ssh, voice, websocket
from tests.applications.application import Application, Roam, Scene
from tests.netns.conftest import MakeLab

pytestmark = pytest.mark.netns

CLIENT = "client1"
HOME = "ap1"
PATH = ("ap2", "ap3", "ap1", "ap3", "ap2", "ap1", "ap2", "ap3", "ap2", "ap1")
DWELL_S = 0.35
CALL_DWELL_S = 0.8
"""Longer, for jitter to calm down between roams."""

Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def domain(module_lab: MakeLab) -> Lab:
    return module_lab(aps=3, clients=1)


@pytest.fixture(autouse=True)
def _at_home(domain: Lab) -> None:
    domain.roam(CLIENT, HOME)


@pytest.fixture
def scene(domain: Lab, tmp_path: Path) -> Scene:
    return Scene(domain, CLIENT, tmp_path)


def roam(lab: Lab, applications: Sequence[Application], dwell_s: float = DWELL_S) -> list[Roam]:
    """Let the client roam along the path; every other time its carrier goes down and up."""
    roams = []
    time.sleep(dwell_s)
    for there, carrier in zip(PATH, itertools.cycle((False, True)), strict=False):
        made = Roam(CLIENT, there, lab.roam(CLIENT, there, carrier=carrier))
        roams.append(made)
        for application in applications:
            application.check()
            application.roamed(made)
        time.sleep(dwell_s)
    return roams


def live_through(
    lab: Lab, record: Record, applications: dict[str, Application], dwell_s: float = DWELL_S
) -> None:
    """Roam, finish all, and report their figures."""
    roams = roam(lab, list(applications.values()), dwell_s)
    for name, application in applications.items():
        for key, value in application.finish(roams).items():
            record(f"{name}: {key}", value)
            print(f"{name}: {key} = {value}")  # noqa: T201 - the figures are to be seen


@pytest.mark.parametrize("version", http.VERSIONS)
def test_curl(scene: Scene, record_property: Record, version: str) -> None:
    with contextlib.ExitStack() as stack:
        download = stack.enter_context(http.download(scene, version))
        upload = stack.enter_context(http.upload(scene, version))
        live_through(scene.lab, record_property, {"download": download, "upload": upload})


def test_ssh_forwards_a_port_and_a_websocket_talks(scene: Scene, record_property: Record) -> None:
    with (
        ssh.forwarded_download(scene) as forwarded,
        websocket.websocket(scene) as talk,
    ):
        live_through(scene.lab, record_property, {"ssh": forwarded, "websocket": talk})


def test_quic_with_and_without_migration(scene: Scene, record_property: Record) -> None:
    with (
        quic.quic(scene) as staying,
        quic.quic(scene, migrate=True) as migrating,
    ):
        live_through(scene.lab, record_property, {"staying": staying, "migrating": migrating})


@pytest.mark.parametrize("down", [False, True], ids=["up", "down"])
def test_iperf3_tcp(scene: Scene, record_property: Record, down: bool) -> None:
    kind = iperf.Kind("tcp", down, "0")
    with iperf.iperf(scene, kind) as running:
        live_through(scene.lab, record_property, {"tcp": running})


def test_iperf3_udp(domain: Lab, tmp_path: Path, record_property: Record) -> None:
    up, down = tmp_path / "up", tmp_path / "down"
    up.mkdir()
    down.mkdir()
    with (
        iperf.iperf(Scene(domain, CLIENT, up), iperf.Kind("udp", False, "10M")) as upwards,
        iperf.iperf(Scene(domain, CLIENT, down), iperf.Kind("udp", True, "10M")) as downwards,
    ):
        live_through(domain, record_property, {"udp up": upwards, "udp down": downwards})


def test_a_voice_call(scene: Scene, record_property: Record) -> None:
    with voice.voice(scene) as call:
        live_through(scene.lab, record_property, {"call": call}, CALL_DWELL_S)
