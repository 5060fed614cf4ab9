"""The demo, as `make demo` runs it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from apagent.lab import namespaces, programs
from apagent.lab.place import PREFIX_VARIABLE

pytestmark = pytest.mark.netns

PREFIX = f"demo{os.getpid()}-"
DEMO_TIMEOUT_S = 90.0


def test_the_download_dies_without_apagent_and_lives_with_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [programs.path("apagent"), "demo", "--out", tmp_path, "--size-mb", "12"],
        env=os.environ | {PREFIX_VARIABLE: PREFIX},
        capture_output=True,
        text=True,
        timeout=DEMO_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["without"]["completed"]
    assert report["with"]["completed"]
    assert report["with"]["sha256_match"]
    assert report["with"]["source_addresses"] == ["203.0.113.11"]
    roams = report["with"]["roams"]
    assert [(roam["from"], roam["to"]) for roam in roams] == [
        ("ap1", "ap2"),
        ("ap2", "ap3"),
        ("ap3", "ap1"),
        ("ap1", "ap2"),
        ("ap2", "ap3"),
    ]
    # The download and the echo, both anchored where they began.
    assert {(roam["flows_kept"], roam["flows"], roam["anchor"]) for roam in roams} == {
        (2, 2, "ap1")
    }
    assert "ap1 -> ap2" in done.stdout
    assert (tmp_path / "report.html").stat().st_size > 0
    assert [name for name in namespaces.names() if name.startswith(PREFIX)] == []
