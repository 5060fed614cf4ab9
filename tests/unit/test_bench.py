"""The benchmarks' own machinery: rows, interleaving, going on after a break, frames."""

from __future__ import annotations

import json
import struct
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from apagent.lab.errors import LabError
from tests.bench import load
from tests.bench.report import table
from tests.bench.rows import alone, compared
from tests.bench.runner import Group, Result, Runner, Trial


def test_a_ratio_is_that_of_the_medians() -> None:
    pairs = [(10.0, 30.0), (12.0, 20.0), (11.0, 22.0)]
    [row] = compared("cpu", "CPU", pairs, "µs", "other", ratio_at_most=0.5)
    assert (row.measured, row.against_measured, row.ratio) == (11.0, 22.0, 0.5)
    assert (row.low, row.high) == (10.0, 12.0)
    assert row.met
    assert row.goal == "at most 0.5 of other's"


@pytest.mark.parametrize(("value", "met"), [(1.9, True), (2.1, False)])
def test_a_row_knows_whether_its_goal_is_met(value: float, met: bool) -> None:
    [row] = alone("start", "restart", [value], "s", at_most=2.0)
    assert row.met is met
    assert ("yes" if met else "NO") in table([row])


def test_two_goals_are_met_together_or_not() -> None:
    [row] = compared("p99", "p99", [(9.0, 1.0)], "ms", "other", at_most=10, ratio_at_most=1.0)
    assert row.met is False
    assert row.goal == "at most 10 ms, at most 1 of other's"


def test_what_was_not_measured_has_no_row() -> None:
    assert alone("x", "x", [], "s") == compared("x", "x", [], "s", "other") == []


def group(order: list[str], broken: bool = False) -> Group:
    def measure(side: str) -> Result:
        order.append(side)
        if broken and side == "b":
            raise LabError("it doesn't start")
        return {"value": float(len(order))}

    trials = [Trial("case", side, lambda side=side: measure(side)) for side in "ab"]  # type: ignore[misc]
    return Group("example", 2, trials, lambda samples: [])


def test_trials_take_turns_and_every_result_is_kept_as_it_comes(tmp_path: Path) -> None:
    order: list[str] = []
    samples = Runner(tmp_path).run(group(order))
    assert order == ["a", "b", "a", "b"]
    assert samples.pairs("case", ("a", "b"), "value") == [(1.0, 2.0), (3.0, 4.0)]
    lines = (tmp_path / "raw/example.jsonl").read_text().splitlines()
    assert [json.loads(line)["side"] for line in lines] == order


def test_a_run_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    Runner(tmp_path).run(group([], broken=True))
    order: list[str] = []
    samples = Runner(tmp_path).run(group(order))
    assert order == ["b", "b"]
    assert len(samples.pairs("case", ("a", "b"), "value")) == 2


def test_the_frames_of_the_load_are_what_they_say() -> None:
    sender = load.Sender(bytes(5) + b"\1", bytes(5) + b"\2", IPv4Address("10.77.1.1"))
    for number in (0, 1, 64_001):
        frame = load.frame(sender, number)
        head = frame[14:34]
        assert load._checksum(head) == 0
        assert head[9] == load.protocol(number)
        assert struct.unpack(">II", head[12:20]) == (0x0A4D0101, load.remote(number))
        assert struct.unpack(">H", frame[34:36]) == (load.port(number),)
    tcp = load.frame(sender, 2)[34:]
    pseudo = struct.pack(">IIHH", 0x0A4D0101, load.remote(2), 6, len(tcp))
    assert load._checksum(pseudo + tcp) == 0
