"""The judge explains what had to be, and nothing else."""

from __future__ import annotations

import math
from typing import Any

from apagent.lab.faults import Way
from tests.chaos.holders import Holdings
from tests.chaos.judge import judge
from tests.chaos.record import Record
from tests.chaos.schedule import Cut, Fault, Kind, Roam, Trouble
from tests.chaos.timeline import Done, Timeline, What

APS = ("ap1", "ap2", "ap3")
AT_AP1, AT_AP2 = "203.0.113.11", "203.0.113.12"
MOVABLE = "203.0.113.101"
"""Of ap1."""


def record(address: str = AT_AP1, lost: str = "", lost_at: float = 60.0, **changes: Any) -> Record:
    settings: dict[str, Any] = {
        "flow": 1,
        "client": "client1",
        "kind": Kind.UP,
        "asked": 1.0,
        "opened": 1.0,
        "last": lost_at,
        "ended": 60.0,
        "gaps": (),
        "seen": ((1.0, f"{address}:4000"),),
        "lost": lost,
        "lost_at": lost_at,
    } | changes
    return Record(**settings)


def reset(at: float, address: str = AT_AP1, **changes: Any) -> Record:
    return record(address, "ConnectionResetError: reset", at, **changes)


def fault(
    trouble: Trouble, ap: str, begin: float, end: float, cuts: tuple[Cut, ...] = ()
) -> list[Done]:
    made = Fault(begin, end, trouble, ap, cuts)
    done = [Done(What.BEGIN, begin, begin, made), Done(What.END, end, end, made)]
    if trouble in (Trouble.POWER, Trouble.KILL, Trouble.FREEZE):
        done.append(Done(What.READY, end + 1.0, end + 1.0, ap=ap))
    return done


def cut(one: str, two: str, way: Way, begin: float, end: float) -> list[Done]:
    return fault(Trouble.PARTITION, one, begin, end, ((one, two, way),))


def roam(ap: str, at: float) -> list[Done]:
    return [Done(What.ROAM, at, at, roam=Roam(at, "client1", ap, carrier=False))]


def timeline(*done: list[Done], home: str = "ap1", held: Holdings | None = None) -> Timeline:
    holders = [(-math.inf, held or {MOVABLE: frozenset({"ap1"})})]
    return Timeline({"client1": home}, APS, [one for each in done for one in each], holders)


def why(flow: Record, time: Timeline) -> str:
    verdict = judge(flow, time)
    assert verdict is not None
    return verdict.why


def test_what_goes_on_survives() -> None:
    assert judge(record(), timeline(fault(Trouble.KILL, "ap1", 10, 14))) is None


def test_a_loss_without_a_cause_is_not_explained() -> None:
    assert why(reset(20), timeline()) == ""
    assert why(reset(20), timeline(fault(Trouble.KILL, "ap1", 19, 21))) == ""
    assert why(reset(20), timeline(fault(Trouble.POWER, "ap2", 19, 25))) == ""
    assert why(reset(20), timeline(fault(Trouble.DRAIN, "ap1", 19, 25))) == ""


def test_an_address_that_cannot_move_dies_with_its_ap() -> None:
    assert "lost its power" in why(reset(20), timeline(fault(Trouble.POWER, "ap1", 19, 25)))
    assert "lost its uplink" in why(reset(20), timeline(fault(Trouble.UPLINK, "ap1", 19, 25)))
    assert why(reset(20), timeline(fault(Trouble.UPLINK, "ap1", 19, 19.2))) == ""


def test_what_was_survived_explains_nothing() -> None:
    """The flow has gone on for long after the AP was back."""
    assert why(reset(50), timeline(fault(Trouble.POWER, "ap1", 19, 25))) == ""


def test_another_address_is_a_loss() -> None:
    moved = record(seen=((1.0, f"{AT_AP1}:4000"), (20.0, f"{AT_AP2}:4000")))
    verdict = judge(moved, timeline())
    assert verdict is not None
    assert (verdict.at, verdict.why) == (20.0, "")


def test_a_tunnel_that_was_cut() -> None:
    far: Any = {"home": "ap2"}
    assert "no tunnel" in why(reset(22), timeline(cut("ap2", "ap1", Way.TUNNEL, 19, 25), **far))
    assert "no tunnel" in why(reset(22), timeline(cut("ap1", "ap2", Way.BACKHAUL, 19, 25), **far))
    assert why(reset(20), timeline(cut("ap1", "ap2", Way.TUNNEL, 19, 19.2), **far)) == ""
    assert why(reset(22), timeline(cut("ap1", "ap3", Way.TUNNEL, 19, 25), **far)) == ""
    assert why(reset(22), timeline(cut("ap1", "ap2", Way.CONTROL, 19, 25), **far)) == ""
    assert why(reset(22), timeline(cut("ap1", "ap2", Way.TUNNEL, 19, 25))) == ""


def test_the_end_of_a_cut_is_seen_by_an_agent_at_work() -> None:
    mended = cut("ap2", "ap1", Way.TUNNEL, 19, 25)
    frozen, later = (fault(Trouble.FREEZE, "ap2", begin, begin + 5) for begin in (24, 28))
    assert why(reset(30.5), timeline(mended, home="ap2")) == ""
    assert "no tunnel" in why(reset(30.5), timeline(mended, frozen, home="ap2"))
    assert why(reset(36), timeline(mended, frozen, home="ap2")) == ""
    assert why(reset(30.5), timeline(mended, later, home="ap2")) == ""


def test_a_flow_that_could_not_be_learned() -> None:
    silent = cut("ap1", "ap2", Way.CONTROL, 9, 30)
    new: Any = {"asked": 10.0, "opened": 10.0}
    assert "learned" in why(reset(20, **new), timeline(silent, roam("ap2", 19.9)))
    assert why(reset(20), timeline(silent, roam("ap2", 19.9))) == ""
    assert why(reset(20, **new), timeline(silent, roam("ap3", 19.9))) == ""
    assert why(reset(50, **new), timeline(silent, roam("ap2", 49.9))) == ""


def test_silence_needs_a_cause() -> None:
    quiet = record(gaps=((20.0, 25.0),))
    verdict = judge(quiet, timeline())
    assert verdict is not None
    assert verdict.why == ""
    assert judge(quiet, timeline(fault(Trouble.KILL, "ap1", 20, 24))) is None
    assert judge(quiet, timeline(fault(Trouble.KILL, "ap2", 20, 24))) is not None
    assert judge(record(gaps=((20.0, 22.0),)), timeline()) is None


def test_corruption_is_never_explained() -> None:
    broken = record(lost="Broken: 32 bytes that nobody has sent", lost_at=20.0)
    assert why(broken, timeline(fault(Trouble.POWER, "ap1", 19, 25))) == ""


def test_who_may_be_succeeded_is_waited_for() -> None:
    cut_off = timeline(cut("ap1", "ap2", Way.BACKHAUL, 19, 20.5), home="ap2")
    assert why(reset(20, MOVABLE), cut_off) == ""
    assert "no tunnel" in why(reset(20), cut_off)


def test_an_address_that_moves_survives_its_ap() -> None:
    lost = reset(20, MOVABLE)
    power = fault(Trouble.POWER, "ap1", 19, 25)
    at_ap2: Any = {"home": "ap2"}
    assert why(lost, timeline(power, **at_ap2)) == ""
    assert why(reset(22.5, MOVABLE), timeline(power, **at_ap2)) == ""
    for others in (("ap2", "ap3"), ("ap3", "ap2")):
        troubled = [fault(Trouble.KILL, ap, 18.5, 22) for ap in others]
        assert "in trouble" in why(lost, timeline(power, *troubled, **at_ap2))
    unknown = reset(20, MOVABLE, asked=18.8, opened=18.8)
    assert "couldn't have learned" in why(unknown, timeline(power, **at_ap2))
