"""The demo's reports, from outcomes that are made up."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

from apagent.lab import report
from apagent.lab.outcome import Outcome, Roam, Transfer

ROAM = Roam(
    from_ap="ap1",
    to_ap="ap2",
    time_ms=1000.04,
    interruption_ms=1.234567,
    silence_ms=4.0,
    echo_interruption_ms=0.8,
    echoes_lost=2,
    flows=3,
    flows_kept=3,
    anchor="ap1",
)
GOOD = Transfer(
    completed=True,
    reason="",
    bytes=2_000_000,
    sha256_match=True,
    source_addresses=("203.0.113.11",),
    roams=(ROAM, replace(ROAM, from_ap="ap2", to_ap="ap3", time_ms=1500.0)),
    duration_s=2.0,
    rates_mbit=(8.0,) * 20,
)
DEAD = Transfer(
    completed=False,
    reason="stalled: no progress for 6 s",
    bytes=500_000,
    sha256_match=False,
    source_addresses=("203.0.113.11", "203.0.113.12"),
    roams=(
        replace(
            ROAM,
            interruption_ms=None,
            echo_interruption_ms=None,
            flows=None,
            flows_kept=None,
            anchor=None,
        ),
    ),
    duration_s=7.0,
    rates_mbit=(8.0,) * 10 + (0.0,) * 60,
)
OUTCOME = Outcome(
    without=DEAD,
    with_apagent=GOOD,
    size=2_000_000,
    rate_mbit=8.0,
    took_s=30.0,
    versions={"apagent": "0", "kernel": "<6>"},
)


def test_the_demo_passes_only_with_all_that_it_is_to_show() -> None:
    assert OUTCOME.passed
    several = replace(GOOD, source_addresses=("203.0.113.11", "203.0.113.12"))
    assert not replace(OUTCOME, with_apagent=several).passed
    assert not replace(OUTCOME, with_apagent=replace(GOOD, sha256_match=False)).passed
    assert not replace(OUTCOME, with_apagent=replace(GOOD, completed=False)).passed
    assert not replace(OUTCOME, without=GOOD).passed


def test_the_verdict_says_what_happened() -> None:
    assert OUTCOME.verdict == (
        "Without apagent the download died after the roam from ap1 to ap2 "
        "(stalled: no progress for 6 s). "
        "With apagent it completed over 2 roams, byte for byte, "
        "and the server saw one address throughout: 203.0.113.11."
    )
    failed = replace(OUTCOME, with_apagent=replace(GOOD, completed=False, reason="reset"))
    assert failed.verdict.endswith("With apagent it did not complete either: reset.")


def test_json_has_the_keys_that_programs_rely_on(tmp_path: Path) -> None:
    as_json, _ = report.write(OUTCOME, tmp_path / "new" / "out")
    read = json.loads(as_json.read_text())
    assert read["passed"] is True
    assert read["without"]["completed"] is False
    assert read["with"]["completed"] is True
    assert read["with"]["sha256_match"] is True
    assert read["with"]["source_addresses"] == ["203.0.113.11"]
    assert len(read["with"]["throughput"]["mbit"]) == 20
    assert read["with"]["roams"][0] == {
        "from": "ap1",
        "to": "ap2",
        "time_ms": 1000.0,
        "interruption_ms": 1.23,
        "silence_ms": 4.0,
        "echo_interruption_ms": 0.8,
        "echoes_lost": 2,
        "flows": 3,
        "flows_kept": 3,
        "anchor": "ap1",
    }


def test_the_table_has_a_line_for_each_roam() -> None:
    heading, first, second = report.table(OUTCOME)
    assert re.split(r"  +", heading) == [
        "roam",
        "interruption",
        "echoes lost",
        "flows kept",
        "anchor",
    ]
    assert re.split(r"  +", first) == ["ap1 -> ap2", "1.2 ms", "2", "3 of 3", "ap1"]
    assert second.startswith("ap2 -> ap3")


class Balanced(HTMLParser):
    """Checks that tags close in order, and collects what the page refers to and says."""

    VOID = frozenset({"meta", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An SVG element without content."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_whole_and_needs_nothing_from_outside() -> None:
    text = report.html(OUTCOME)
    page = Balanced()
    page.feed(text)
    page.close()
    assert page.open == []
    assert page.references == []
    assert "url(" not in text
    assert "@import" not in text


def test_the_page_marks_roams_in_both_pictures_and_escapes_text() -> None:
    page = Balanced()
    page.feed(report.html(OUTCOME))
    assert page.text.count("ap1 → ap2") == 3  # two pictures and the table
    assert page.text.count("ap2 → ap3") == 2
    assert "gave up: stalled: no progress for 6 s" in page.text
    assert any("kernel <6>" in text for text in page.text)


def test_a_transfer_without_a_single_byte_can_be_shown() -> None:
    nothing = replace(DEAD, bytes=0, roams=(), rates_mbit=(), duration_s=0.0)
    page = Balanced()
    page.feed(report.html(replace(OUTCOME, without=nothing, with_apagent=nothing)))
    assert page.open == []
