"""What a lab consists of, kept in its state directory from before any of it is made."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import asdict, dataclass

from apagent.lab.errors import LabError, LabNotUp
from apagent.lab.place import Place

_NEW = ".new"
BUILDING, UP = "building", "up"


@dataclass(frozen=True, slots=True)
class State:
    """The size of a lab, whether its APs run apagent, and how far `up` has come."""

    aps: int
    clients: int
    agents: bool
    phase: str = BUILDING
    networks: int = 1
    twins: bool = False
    takeover: bool = False


def claim(place: Place, state: State) -> None:
    """Take the place for a new lab. Raises LabError if it is taken."""
    _make_root(place)
    if not exists(place) and any(place.root.iterdir()):
        raise LabError(f"{place.root} is not empty; choose another APAGENT_LAB_ROOT")
    try:
        with place.state_file.open("x", encoding="utf-8") as file:
            file.write(_text(state))
    except FileExistsError:
        raise LabError(
            f"there is a lab in {place.root} already; `apagent lab down` takes it down, or choose "
            "another APAGENT_LAB_PREFIX for a second one"
        ) from None


def record(place: Place, state: State) -> None:
    """Replace the state in one step."""
    new = place.state_file.with_suffix(_NEW)
    new.write_text(_text(state), encoding="utf-8")
    new.replace(place.state_file)


def load(place: Place) -> State:
    """Read the state. Raises LabNotUp if there is no lab."""
    try:
        return State(**json.loads(place.state_file.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        raise LabNotUp(f"no lab in {place.root}; `apagent lab up` makes one") from None
    except (ValueError, TypeError):
        raise LabError(
            f"{place.state_file} is damaged; `apagent lab down` clears what is left of the lab"
        ) from None


def exists(place: Place) -> bool:
    """Whether a lab has claimed the place."""
    return place.state_file.exists()


def forget(place: Place) -> None:
    """Remove the APs' directories and then the state; without a state nothing is touched."""
    if not exists(place):
        return
    for entry in place.root.iterdir():
        if place.owns(place.namespace(entry.name)):
            shutil.rmtree(entry, ignore_errors=True)
    place.state_file.with_suffix(_NEW).unlink(missing_ok=True)
    place.state_file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody else's file is in it
        place.root.rmdir()


def _make_root(place: Place) -> None:
    try:
        place.root.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(
            f"{place.root} can't be made ({error.strerror}); run as root, or set APAGENT_LAB_ROOT"
        ) from error


def _text(state: State) -> str:
    return json.dumps(asdict(state), indent=2) + "\n"
