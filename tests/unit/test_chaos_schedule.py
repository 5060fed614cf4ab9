"""Schedules: the same from the same seed, and survivable."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tests.chaos.schedule import Schedule, Trouble, plan

APS = ("ap1", "ap2", "ap3", "ap4")
HOMES = {f"client{n}": APS[n % 4] for n in range(6)}
SECONDS = 60.0


@pytest.fixture(params=range(5))
def schedule(request: pytest.FixtureRequest) -> Schedule:
    return plan(request.param, SECONDS, HOMES, APS)


def test_a_seed_is_a_schedule(schedule: Schedule) -> None:
    assert plan(schedule.seed, SECONDS, HOMES, APS) == schedule
    assert plan(schedule.seed + 100, SECONDS, HOMES, APS).faults != schedule.faults
    assert len(list(schedule.lines())) == len(schedule.faults) + len(schedule.roams)


def test_everything_happens_sometime() -> None:
    faults = [fault for seed in range(5) for fault in plan(seed, SECONDS, HOMES, APS).faults]
    assert {fault.trouble for fault in faults} == set(Trouble)


def test_two_aps_can_always_anchor_flows(schedule: Schedule) -> None:
    disabling = {Trouble.POWER, Trouble.UPLINK, Trouble.DRAIN}
    for fault in schedule.faults:
        disabled = {
            f.ap
            for f in schedule.faults
            if f.trouble in disabling and f.begin <= fault.begin <= f.end
        }
        assert len(disabled) <= 2


def test_a_client_leaves_an_ap_without_power(schedule: Schedule) -> None:
    moves = {client: [(0.0, home)] for client, home in HOMES.items()}
    for roam in schedule.roams:
        assert roam.ap != moves[roam.client][-1][1]
        moves[roam.client].append((roam.at, roam.ap))
    for stays in moves.values():
        for (begin, ap), (end, _) in pairwise([*stays, (SECONDS, "")]):
            for fault in schedule.faults:
                if (fault.trouble, fault.ap) == (Trouble.POWER, ap):
                    assert not max(begin, fault.begin + 1.2) < min(end, fault.end)


def test_flows_of_a_client_are_numbered_and_end_in_time(schedule: Schedule) -> None:
    assert [talk.number for talk in schedule.talks] == list(range(len(schedule.talks)))
    assert all(0 <= talk.begin < talk.end <= SECONDS for talk in schedule.talks)
