"""A fixed set of seeds on every run, scenarios that once failed, and proof that it can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from apagent.core import claims, clients
from apagent.core.anchors import Anchors
from apagent.core.claims import Claims
from apagent.core.clients import ClientTable
from apagent.core.events import Source
from apagent.core.feed import FeedLog
from apagent.core.forwards import MovingForwards
from apagent.core.roam import Verdict, judge
from apagent.core.session_tables import SessionTables
from tests.simulation.__main__ import main
from tests.simulation.scenario import parse
from tests.simulation.script import draw
from tests.simulation.simulate import failure, shrink

SMALL = range(200)
LARGE = (7,)
"""Seeds of worlds with 50 APs."""
ENOUGH = 200
"""Seeds among which one must find a fault that was put in on purpose, if nothing that once failed
does."""
REGRESSIONS = sorted((Path(__file__).parent / "regressions").glob("*.txt"))


@pytest.mark.parametrize("tens", range(SMALL.start, SMALL.stop, 50))
def test_small_domains_come_to_agree(tens: int) -> None:
    for seed in range(tens, tens + 50):
        assert failure(draw(seed)) is None, f"replay: python -m tests.simulation --seed {seed}"


@pytest.mark.parametrize("seed", LARGE)
def test_fifty_aps_come_to_agree(seed: int) -> None:
    assert failure(draw(seed, aps=50)) is None


@pytest.mark.parametrize("file", REGRESSIONS, ids=lambda file: file.stem)
def test_what_once_failed_holds(file: Path) -> None:
    assert failure(parse(file.read_text(encoding="ascii"))) is None


def test_a_scenario_is_read_back_as_it_was_written() -> None:
    scenario = draw(5)
    assert parse(str(scenario)) == scenario


@pytest.mark.parametrize("seed", [11, 12])
def test_a_seed_gives_the_same_run_in_every_process(seed: int) -> None:
    command = [sys.executable, "-m", "tests.simulation", "--seed", str(seed), "--trace"]
    runs = {
        subprocess.run(
            command,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(runs) == 1


# --- faults that were put in on purpose

_merge = ClientTable.merge
_since = FeedLog.since
_replace = SessionTables.replace
_judge = judge
_probed = Anchors.probed


def _latest_heard_wins(table: ClientTable, claim: Any, now: float) -> Any:
    for ap in set(table._said.get(claim.mac, ())) - {claim.ap, table._me}:
        del table._said[claim.mac][ap]
    return _merge(table, claim, now)


def _resume_in_any_run(log: FeedLog, epoch: int, sequence: int) -> Any:
    return _since(log, log.epoch, sequence)


def _resume_too_late(log: FeedLog, epoch: int, sequence: int) -> Any:
    oldest = log.sequence - len(log._pieces)
    return _since(log, epoch, max(sequence, oldest) if epoch == log.epoch else sequence)


def _nobody_answers(anchors: Anchors, nat: Any, _used_by: Any) -> None:
    _probed(anchors, nat, None)


def _any_anchor(table: SessionTables, socket: Any) -> Any:
    return next((ap for ap, held in table._sockets.items() if socket in held), None)


def _ignore_data(event: Any, *known: Any) -> Verdict:
    return Verdict.IGNORE if event.source is Source.DATA else _judge(event, *known)


def _keep_what_a_listing_lacks(table: SessionTables, ap: Any, sessions: Any) -> Any:
    return table.apply(ap, sessions) if ap == table._me else _replace(table, ap, sessions)


MUTANTS: dict[str, tuple[object, str, Callable[..., Any]]] = {
    "the claim that was heard last wins": (ClientTable, "merge", _latest_heard_wins),
    "a higher AP id doesn't win": (clients, "_rank", lambda c: (not c.outdone, c.generation)),
    "a forgotten claim stays": (ClientTable, "unsaid", lambda *_: []),
    "a lost address is claimed again": (ClientTable, "addresses", lambda _, c: c.claim.addresses),
    "a feed is resumed in another run": (FeedLog, "since", _resume_in_any_run),
    "a feed is resumed after a gap": (FeedLog, "since", _resume_too_late),
    "a flow keeps two anchors": (SessionTables, "_find_lost", lambda *_: None),
    "a socket leads to the first of its flows": (SessionTables, "socket_anchor", _any_anchor),
    "a client that came back in silence isn't found": (claims, "judge", _ignore_data),
    "a client that has left stays": (Claims, "release_silent", lambda *_: None),
    "a change doesn't reach the kernel": (ClientTable, "_touch", lambda *_: None),
    "a lost end is not found": (SessionTables, "replace", _keep_what_a_listing_lacks),
    "an address in use is taken": (Anchors, "probed", _nobody_answers),
    "port forwards stay behind": (MovingForwards, "learn", lambda *_: None),
    "a drained AP keeps its addresses": (Anchors, "_wanted_heir", lambda *_: None),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, what, fault = MUTANTS[name]
    monkeypatch.setattr(where, what, fault)
    once_failed = (parse(file.read_text(encoding="ascii")) for file in REGRESSIONS)
    drawn = map(draw, range(ENOUGH))
    assert any(failure(scenario) is not None for scenario in chain(once_failed, drawn))


def test_a_failing_scenario_is_shown_and_made_small(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(SessionTables, "_find_lost", lambda *_: None)
    seed = next(seed for seed in range(ENOUGH) if failure(draw(seed)) is not None)
    assert main(["--seeds", f"{seed}", "--jobs", "1"]) == 1
    told = capsys.readouterr().out
    assert f"--seed {seed}" in told
    found = failure(draw(seed))
    assert found is not None
    small = shrink(found)
    assert small.kind == found.kind
    assert len(small.scenario.steps) < len(found.scenario.steps) / 4
    script = tmp_path / "small.txt"
    script.write_text(str(small.scenario), encoding="ascii")
    assert main(["--script", str(script), "--trace"]) == 1
    assert small.reason in capsys.readouterr().out
