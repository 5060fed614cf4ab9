"""Claims on one client: late, twice, in the wrong order, and two at the same moment."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest

from apagent.core.effects import Effect, Publish
from apagent.core.engine import Engine
from apagent.core.events import (
    ClientSeen,
    Event,
    FlowsListed,
    PeerDelta,
    PeerSnapshot,
    Source,
)
from apagent.core.model import ApId, Claim
from tests.domains import ANN, ANN_IP, AP1, AP2, AP3, LAN, claim, domain

HISTORY = (claim(AP2, 2), claim(AP3, 3), claim(AP2, 4), claim(AP3, 5))
"""A client that went to and fro between two peers; the last one is true."""


def in_sync(me: ApId) -> Engine:
    e = Engine(domain(me))
    e.step(FlowsListed({}), 0.0)
    for peer in e.peers:
        e.step(PeerSnapshot(peer, 0), 0.0)
    return e


def hear(e: Engine, heard: Claim) -> None:
    e.step(PeerDelta(heard.ap, heard.generation, claims=(heard,)), 0.0)


def place(e: Engine) -> Claim:
    client = e.clients[LAN].get(ANN)
    assert client is not None
    return client.claim


def as_each_feed_says(order: tuple[Claim, ...]) -> bool:
    """Whether the claims of each AP come in the order in which it made them."""
    return all(
        [c for c in order if c.ap == ap] == [c for c in HISTORY if c.ap == ap] for ap in (AP2, AP3)
    )


@pytest.mark.parametrize("order", [o for o in permutations(HISTORY) if as_each_feed_says(o)])
def test_an_old_claim_never_wins_whenever_it_comes(order: tuple[Claim, ...]) -> None:
    e = in_sync(AP1)
    for heard in order:
        hear(e, heard)
        hear(e, heard)
    assert place(e) == HISTORY[-1]
    assert e.wanted()[LAN].routes == {ANN_IP: AP3}
    assert e.clock == 5


@pytest.mark.parametrize("late", HISTORY)
def test_nor_does_one_from_before_the_client_came_here(late: Claim) -> None:
    e = in_sync(AP1)
    for heard in HISTORY:
        hear(e, heard)
    e.step(ClientSeen(LAN, ANN, Source.FDB), 0.0)
    hear(e, late)
    assert place(e) == claim(AP1, 6)
    assert ANN_IP in e.wanted()[LAN].neighbours


@pytest.mark.parametrize("source", [Source.FDB, Source.DATA, Source.MANAGEMENT])
@pytest.mark.parametrize(("one", "other"), list(permutations((AP1, AP2, AP3), 2)))
def test_two_that_claim_at_the_same_moment_agree_within_one_exchange(
    one: ApId, other: ApId, source: Source
) -> None:
    engines = {ap: in_sync(ap) for ap in (AP1, AP2, AP3)}
    for e in engines.values():
        e.step(PeerDelta(next(iter(e.peers)), 7), 0.0)
    said = {ap: _claims(engines[ap], ap, source) for ap in (one, other)}
    for ap, delta in said.items():
        for e in engines.values():
            if e.me != ap:
                loses = e.me in said and e.me < ap
                answer = [replace(claim(e.me, 8), outdone=True)] if loses else []
                assert _said(e.step(delta, 0.0)) == answer
    places = {ap: place(e) for ap, e in engines.items()}
    assert set(places.values()) == {claim(max(one, other), 8)}
    served = [ap for ap, e in engines.items() if ANN_IP in e.wanted()[LAN].neighbours]
    assert served == [max(one, other)]


def _claims(e: Engine, ap: ApId, source: Source) -> Event:
    """The AP sees the client; what it tells the others."""
    said = _said(e.step(ClientSeen(LAN, ANN, source, ANN_IP), 0.0))
    return PeerDelta(ap, e.clock, claims=tuple(said))


def _said(effects: list[Effect]) -> list[Claim]:
    return [claim for effect in effects if isinstance(effect, Publish) for claim in effect.claims]
