"""Prefix and root of a lab."""

from pathlib import Path

import pytest

from apagent.lab.errors import LabError
from apagent.lab.place import Place


def test_the_default_place() -> None:
    assert Place.from_environment({}) == Place("apl-", Path("/run/apagent-lab"))


def test_another_prefix_has_another_root() -> None:
    place = Place.from_environment({"APAGENT_LAB_PREFIX": "my-lab-"})
    assert place == Place("my-lab-", Path("/run/apagent-lab-my-lab"))


def test_both_can_be_given() -> None:
    given = {"APAGENT_LAB_PREFIX": "x-", "APAGENT_LAB_ROOT": "/run/elsewhere"}
    assert Place.from_environment(given) == Place("x-", Path("/run/elsewhere"))


@pytest.mark.parametrize("prefix", ["apl", "Apl-", "-", "a/b-", "../-", "a--", "a b-", "1-"])
def test_an_unusable_prefix_is_refused_by_its_variable(prefix: str) -> None:
    with pytest.raises(LabError, match=r"^APAGENT_LAB_PREFIX: "):
        Place.of(prefix)


@pytest.mark.parametrize("root", ["relative", "/run/" + "x" * 90])
def test_an_unusable_root_is_refused_by_its_variable(root: str) -> None:
    with pytest.raises(LabError, match=r"^APAGENT_LAB_ROOT: "):
        Place.of("apl-", root)


@pytest.mark.parametrize("node", ["internet", "server", "fabric", "ap1", "ap12", "client250"])
def test_it_owns_its_nodes(node: str) -> None:
    place = Place.of("apl-")
    assert place.owns(place.namespace(node))


@pytest.mark.parametrize("name", ["apl-b-ap1", "ap1", "apl-", "apl-other", "apl-ap1x", "xapl-ap1"])
def test_it_owns_nothing_else(name: str) -> None:
    assert not Place.of("apl-").owns(name)
