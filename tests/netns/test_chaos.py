"""The chaos run itself: all survives where nothing breaks, and it finds an agent that is broken."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from apagent.lab.place import PREFIX_VARIABLE
from tests.chaos import __main__ as chaos

pytestmark = pytest.mark.netns

QUIET = ("--aps", "3", "--clients", "4", "--seconds", "10", "--seed", "3", "--calm")


@pytest.fixture(autouse=True)
def _own_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREFIX_VARIABLE, f"t{os.getpid()}c-")
    monkeypatch.setattr("tests.chaos.run._AGREE_S", 6.0)
    monkeypatch.setattr("tests.chaos.run._FINISH_S", 6.0)


def run(out: Path, *options: str) -> tuple[int, Any]:
    code = chaos.main([*QUIET, "--out", str(out), *options])
    return code, json.loads((out / "report.json").read_text())


def test_where_nothing_breaks_every_flow_survives(tmp_path: Path) -> None:
    code, report = run(tmp_path)
    assert (code, report["survived"], report["lost_explained"]) == (0, report["flows"], [])
    assert report["flows"] > 10


def test_an_agent_that_forgets_its_peers_sessions_is_found(tmp_path: Path) -> None:
    code, report = run(tmp_path, "--sabotage", "ap2")
    assert code == 1
    assert report["lost_unexplained"]
    assert report["disagreements"]
