"""Who counts as dead, round by round."""

from __future__ import annotations

from apagent.core.liveness import (
    ALIVE_AFTER,
    RESTART,
    SILENT_AFTER,
    UPLINK_DEAD_AFTER,
    UPLINK_WORKS_AFTER,
    Liveness,
    Uplinks,
)
from tests.domains import AP2, AP3, LAN

DEAD_AFTER = 3


def liveness() -> Liveness:
    made = Liveness([AP2, AP3], DEAD_AFTER)
    made.take({AP2, AP3})
    return made


def test_a_peer_is_dead_after_so_many_rounds_in_a_row() -> None:
    peers = liveness()
    for _ in range(DEAD_AFTER - 1):
        assert peers.take({AP3}) == set()
    peers.take({AP2, AP3})
    for _ in range(DEAD_AFTER - 1):
        assert peers.take({AP3}) == set()
    assert peers.take({AP3}) == {AP2}
    assert peers.dead == {AP2}


def test_one_answer_brings_nobody_back() -> None:
    peers = liveness()
    for _ in range(DEAD_AFTER):
        peers.take({AP3})
    for _ in range(ALIVE_AFTER - 1):
        assert peers.take({AP2, AP3}) == set()
    assert peers.take({AP2, AP3}) == {AP2}
    assert peers.dead == set()


def test_who_has_never_answered_lives_as_long_as_its_feed_does() -> None:
    peers = Liveness([AP2, AP3], DEAD_AFTER)
    for _ in range(SILENT_AFTER):
        assert peers.take({AP3}, heard={AP2, AP3}) == set()
    assert peers.silent == {AP2}
    for _ in range(RESTART - 1):
        assert peers.take({AP3}, heard={AP3}) == set()
    assert peers.take({AP3}, heard={AP3}) == peers.dead == {AP2}


def test_who_has_answered_once_dies_though_its_feed_is_in_sync() -> None:
    peers = liveness()
    for _ in range(DEAD_AFTER):
        peers.take({AP3}, heard={AP2, AP3})
    assert peers.dead == {AP2}


def test_an_uplink_that_flaps_changes_nothing_and_one_that_stays_down_is_dead() -> None:
    uplinks = Uplinks([LAN])
    for _ in range(10):
        for _ in range(UPLINK_DEAD_AFTER - 1):
            assert uplinks.take({LAN: "no carrier"}) == {}
        assert uplinks.take({LAN: ""}) == {}
    changes = [uplinks.take({LAN: "no carrier"}) for _ in range(UPLINK_DEAD_AFTER)]
    assert changes[-1] == {LAN: "no carrier"} == uplinks.down
    changes = [uplinks.take({LAN: ""}) for _ in range(UPLINK_WORKS_AFTER)]
    assert changes[-1] == {LAN: ""}
    assert uplinks.down == {}
