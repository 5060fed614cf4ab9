"""The state file and the directory around it."""

from pathlib import Path

import pytest

from apagent.lab import state
from apagent.lab.errors import LabError, LabNotUp
from apagent.lab.place import Place

SMALL = state.State(aps=1, clients=1, agents=False)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place("t-", tmp_path / "lab")


def test_what_is_claimed_can_be_read_back(place: Place) -> None:
    state.claim(place, SMALL)
    assert state.load(place) == SMALL
    assert SMALL.phase == state.BUILDING


def test_it_can_be_replaced(place: Place) -> None:
    state.claim(place, SMALL)
    up = state.State(aps=1, clients=1, agents=False, phase=state.UP)
    state.record(place, up)
    assert state.load(place) == up


def test_a_place_is_claimed_once(place: Place) -> None:
    state.claim(place, SMALL)
    with pytest.raises(LabError, match="`apagent lab down`"):
        state.claim(place, SMALL)


def test_a_directory_with_other_files_is_refused_and_left_alone(place: Place) -> None:
    place.root.mkdir()
    (place.root / "ap1").mkdir()
    with pytest.raises(LabError, match="is not empty"):
        state.claim(place, SMALL)
    state.forget(place)
    assert (place.root / "ap1").is_dir()


def test_no_lab(place: Place) -> None:
    with pytest.raises(LabNotUp, match="`apagent lab up`"):
        state.load(place)
    state.forget(place)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"aps": 1, "unknown": 2}'])
def test_damage_is_reported_with_the_way_out(place: Place, text: str) -> None:
    state.claim(place, SMALL)
    place.state_file.write_text(text)
    with pytest.raises(LabError, match="is damaged; `apagent lab down`"):
        state.load(place)


def test_forgetting_leaves_nothing(place: Place) -> None:
    state.claim(place, SMALL)
    place.ap_directory("ap1").mkdir()
    (place.ap_directory("ap1") / "agent.log").write_text("log")
    state.forget(place)
    assert not place.root.exists()


def test_forgetting_spares_files_that_are_not_ours(place: Place) -> None:
    state.claim(place, SMALL)
    (place.root / "notes").write_text("mine")
    state.forget(place)
    assert [entry.name for entry in place.root.iterdir()] == ["notes"]
