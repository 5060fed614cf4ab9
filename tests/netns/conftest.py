"""Labs for tests: made on request, taken down after, their agents' logs in the report of a failure.

A test asks for `lab` and calls it: `lab(aps=3, clients=2, agents=True)` is a lab that is up. Tests
of a module that don't disturb each other share one through `module_lab`.

Where the APs run agents, every uplink is watched for as long as the lab lives: a packet with a
client's own address fails the test, and so does one that only the leak guard has stopped.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from apagent.lab import namespaces
from apagent.lab.capture import Capture
from apagent.lab.lab import Lab
from apagent.lab.place import Place

MakeLab = Callable[..., Lab]

_LOG_LINES = 200
_numbers = itertools.count(1)
_up: dict[Lab, Capture] = {}


@pytest.fixture
def place() -> Iterator[Place]:
    """A place of its own, where nothing may be left after the test."""
    place = Place.of(f"t{os.getpid()}n{next(_numbers)}-")
    try:
        yield place
        _assert_nothing_left(place)
    finally:
        Lab(place=place).down()


@pytest.fixture
def lab() -> Iterator[MakeLab]:
    """Makes labs that live as long as the test."""
    with _maker() as make:
        yield make


@pytest.fixture(scope="module")
def module_lab() -> Iterator[MakeLab]:
    """Makes labs that live as long as the module's tests."""
    with _maker() as make:
        yield make


@contextlib.contextmanager
def _maker() -> Iterator[MakeLab]:
    with contextlib.ExitStack() as stack:

        def make(aps: int = 3, clients: int = 2, **settings: Any) -> Lab:
            place = Place.of(f"t{os.getpid()}n{next(_numbers)}-")
            lab = Lab(aps, clients, place=place, **settings)
            lab.up()
            stack.callback(lab.down)
            _up[lab] = lab.watch_for_leaks()
            stack.callback(_take_down, lab)
            return lab

        yield make


def _take_down(lab: Lab) -> None:
    leaks = _up.pop(lab)
    try:
        with leaks:
            _assert_no_leak(lab, leaks)
    finally:
        lab.down()
    _assert_nothing_left(lab.place)


@pytest.fixture(autouse=True)
def _no_leak() -> Iterator[None]:
    """Name the test that leaked, also where tests share a lab."""
    yield
    for lab, leaks in _up.items():
        _assert_no_leak(lab, leaks)


@contextlib.contextmanager
def leaks_expected(lab: Lab) -> Iterator[None]:
    """What leaks within the block is no failure: there is no table that could stop it."""
    with stopped_leaks_expected(lab):
        try:
            yield
        finally:
            _up[lab].close()
            _up[lab] = lab.watch_for_leaks()


@contextlib.contextmanager
def stopped_leaks_expected(lab: Lab) -> Iterator[None]:
    """What the leak guard stops within the block is no failure: a way was missing."""
    try:
        yield
    finally:
        for ap in lab.aps:
            lab.run(ap, ["nft", "reset", "counters", "table", "inet", "apagent"])


def _assert_no_leak(lab: Lab, leaks: Capture) -> None:
    if not lab.has_agents:
        return
    assert leaks.count() == 0, [str(packet) for packet in leaks.packets()]
    stopped = {ap: _stopped_by_the_leak_guard(lab, ap) for ap in lab.aps}
    assert stopped == dict.fromkeys(lab.aps, 0)


def _stopped_by_the_leak_guard(lab: Lab, ap: str) -> int:
    """What `apctl status` calls leaked packets, also where no agent runs."""
    answer = lab.run(ap, ["nft", "-j", "list", "counters"]).stdout
    counters = [item["counter"] for item in json.loads(answer)["nftables"] if "counter" in item]
    return sum(counter["packets"] for counter in counters if counter["name"] == "leaked_packets")


def _assert_nothing_left(place: Place) -> None:
    assert [name for name in namespaces.names() if place.owns(name)] == []
    assert not place.root.exists()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """Attach the agents' logs to a failure, while the lab is still up."""
    report = yield
    if report.failed:
        for lab in _up:
            for ap in lab.aps if lab.has_agents else ():
                title = f"log of the agent of {lab.namespace(ap)}"
                report.sections.append((title, lab.agents.log_end(ap, _LOG_LINES)))
    return report
