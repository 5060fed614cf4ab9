"""Port forwards as standing sessions, and which of them an AP has where NAT addresses move."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address

from hypothesis import given
from hypothesis import strategies as st

from apagent.core.domain import Forward
from apagent.core.forwards import MovingForwards, forwards_of, standing_sessions
from apagent.core.model import TCP, UDP, SocketKey, Translation, is_standing, packed_socket
from tests.domains import ANN_IP, BEN_IP, takeover, tcp

OURS, THEIRS = IPv4Address("203.0.113.21"), IPv4Address("203.0.113.22")
WEB = Forward(TCP, 8080, ANN_IP, 80)
INSIDE = packed_socket(ANN_IP, TCP, 80)

ADDRESSES = (OURS, THEIRS)


@st.composite
def forwards(draw: st.DrawFn) -> dict[SocketKey, SocketKey]:
    """Few addresses and ports, the last one among them, so that many have a socket in common."""
    protocol = st.sampled_from((TCP, UDP))
    found = {}
    for _ in range(draw(st.integers(0, 8))):
        number = draw(protocol)
        port = draw(st.sampled_from((1, 2, 65534, 65535)))
        outside = packed_socket(draw(st.sampled_from(ADDRESSES)), number, port)
        found[outside] = packed_socket(draw(st.sampled_from((ANN_IP, BEN_IP))), number, 80)
    return found


@given(forwards())
def test_standing_sessions_tell_every_forward(wanted: dict[SocketKey, SocketKey]) -> None:
    sessions = standing_sessions(wanted)
    assert all(map(is_standing, sessions))
    assert len(sessions) == len(wanted)
    heard = [
        forwards_of(address, {**sessions, tcp(1): Translation(OURS, 1).packed})
        for address in ADDRESSES
    ]
    assert {**heard[0], **heard[1]} == wanted


def test_the_number_of_a_standing_session_is_its_port() -> None:
    [(key, nat)] = standing_sessions({WEB.outside(OURS): WEB.inside}).items()
    assert key[11:] == (8080).to_bytes(2, "big")
    assert Translation.of(nat) == Translation(OURS, 8080)


def test_at_home_the_configuration_has_the_forwards() -> None:
    known = MovingForwards(replace(takeover(), forwards=(WEB,)))
    former = {Forward(TCP, 9, BEN_IP, 9).outside(OURS): packed_socket(BEN_IP, TCP, 9)}
    known.adopt(former)
    known.learn(OURS, standing_sessions(former))
    assert known.of({OURS}) == {WEB.outside(OURS): INSIDE}
    assert known.foreign() == set()


def test_those_of_another_ap_are_learned_and_forgotten() -> None:
    known = MovingForwards(replace(takeover(), forwards=(WEB,)))
    known.learn(THEIRS, standing_sessions({WEB.outside(THEIRS): INSIDE, WEB.outside(OURS): INSIDE}))
    assert known.of({THEIRS}) == {WEB.outside(THEIRS): INSIDE}
    assert known.of({OURS, THEIRS}).keys() == {WEB.outside(OURS), WEB.outside(THEIRS)}
    assert known.foreign() == {THEIRS}
    known.forget_others({OURS})
    assert known.of({THEIRS}) == {}
