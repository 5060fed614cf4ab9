"""Whose claim on a client wins, and what an AP says of its own that doesn't."""

from __future__ import annotations

from dataclasses import replace

import pytest

from apagent.core import clients
from apagent.core.clients import ClientTable
from apagent.core.model import Claim, Mac
from tests.domains import ANN, ANN_IP, AP1, AP2, AP3, BEN, LAN, claim


def table(*said: Claim) -> ClientTable:
    made = ClientTable(AP1)
    for one in said:
        made.merge(one, 0.0)
    return made


def winner(made: ClientTable) -> Claim | None:
    client = made.get(ANN)
    return client.claim if client else None


def withdrawn(said: Claim) -> Claim:
    return Claim(LAN, said.mac, said.ap, said.generation, withdrawn=True)


def outdone(said: Claim) -> Claim:
    return replace(said, outdone=True)


def test_our_claim_is_called_outdone_once() -> None:
    made = table(claim(AP1, 1), claim(AP2, 2), claim(AP2, 2), claim(AP3, 3))
    assert made.restated == [outdone(claim(AP1, 1))]
    assert made.own_claims() == made.restated


def test_an_outdone_claim_counts_until_the_higher_one_is_heard() -> None:
    made = table(claim(AP2, 2), outdone(claim(AP2, 2)))
    assert winner(made) == outdone(claim(AP2, 2))
    assert made.place(ANN_IP).ap == AP2
    made.merge(claim(AP3, 0), 0.0)
    assert winner(made) == claim(AP3, 0), "what an AP finds at its start is better than that"
    made.merge(claim(AP3, 3), 0.0)
    assert winner(made) == claim(AP3, 3)


def test_our_outdone_claim_does_not_come_to_life_again() -> None:
    made = table(claim(AP1, 1), claim(AP2, 2))
    made.restated.clear()
    made.merge(withdrawn(claim(AP2, 2)), 0.0)
    assert made.restated == [withdrawn(claim(AP1, 1))]
    assert winner(made) is None
    assert not made.places()


def test_a_release_takes_our_outdone_claim_back() -> None:
    made = table(claim(AP1, 1), claim(AP2, 2))
    made.restated.clear()
    made.merge(Claim(LAN, ANN, AP2, 3, released=True), 0.0)
    assert made.restated == [withdrawn(claim(AP1, 1))]
    assert made.own_claims() == []


def test_our_release_is_taken_back_when_the_client_returns_elsewhere() -> None:
    left = Claim(LAN, ANN, AP1, 2, released=True)
    made = table(claim(AP1, 1), left)
    assert made.own_claims() == [left]
    made.merge(claim(AP2, 3), 0.0)
    assert made.restated == [withdrawn(left)]


def test_what_an_ap_leaves_out_of_a_snapshot_it_has_withdrawn() -> None:
    made = table(claim(AP2, 2), claim(AP2, 3, BEN), claim(AP3, 1))
    assert made.unsaid(AP2, {BEN}) == [withdrawn(claim(AP2, 2))]
    assert made.unsaid(AP2, {ANN, BEN}) == []


def test_outdone_claims_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "MAX_OUTDONE", 2)
    made = table()
    for n in range(3):
        mac = Mac(f"02:00:00:00:00:{n:02x}")
        made.merge(claim(AP1, 1 + n, mac), 0.0)
        made.merge(claim(AP2, 9 + n, mac), 0.0)
    assert len(made.own_claims()) == 2
    assert made.restated[-1] == withdrawn(claim(AP1, 1, Mac("02:00:00:00:00:00")))


def test_equal_provisional_claims_on_an_address_are_decided_alike_everywhere() -> None:
    one, other = claim(AP2, 0, ANN, ANN_IP), claim(AP2, 0, BEN, ANN_IP)
    for made in (table(one, other), table(other, one)):
        owner = made.owner(ANN_IP)
        assert owner is not None
        assert owner.claim.mac == max(ANN, BEN)
