"""The engine, as dialogues of events and effects."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address

import pytest

from apagent.core.clients import Client
from apagent.core.desired import Change
from apagent.core.domain import Forward
from apagent.core.effects import (
    AskClient,
    Effect,
    EndFlows,
    Ending,
    ForgetClient,
    NotePeer,
    NoteRoam,
    NoteSync,
    Publish,
    WelcomeClient,
)
from apagent.core.engine import Engine, PeerState
from apagent.core.events import (
    ClientAged,
    ClientSeen,
    ClientsFound,
    Event,
    FlowsChanged,
    FlowsListed,
    KernelAdopted,
    PeerConnected,
    PeerDelta,
    PeerDisconnected,
    PeerSnapshot,
    Source,
    SyncTimedOut,
)
from apagent.core.forwards import standing_sessions
from apagent.core.model import MAX_GENERATION, ApId, Claim, Mac
from apagent.core.roam import SIGHTINGS, Verdict, Where
from tests.domains import (
    ANN,
    ANN_IP,
    AP1,
    AP2,
    AP3,
    BEN,
    BEN_IP,
    LAN,
    NAT,
    claim,
    domain,
    lan,
    tcp,
)
from tests.domains import at as since


def engine(me: ApId = AP1) -> Engine:
    """An engine in sync, that knows nothing else."""
    e = Engine(domain(me))
    e.step(FlowsListed({}), 0.0)
    for peer in e.peers:
        e.step(PeerSnapshot(peer, clock=0), 0.0)
    assert e.in_sync
    e.take_deltas()
    return e


def seen(
    mac: Mac = ANN, source: Source = Source.FDB, address: IPv4Address | None = None
) -> ClientSeen:
    return ClientSeen(LAN, mac, source, address)


def claims(effects: list[Effect]) -> list[Claim]:
    return [c for effect in effects if isinstance(effect, Publish) for c in effect.claims]


def at(e: Engine, mac: Mac = ANN) -> ApId | None:
    client = e.clients[LAN].get(mac)
    return client.claim.ap if client else None


def place_client(e: Engine, ap: ApId, generation: int = 5) -> None:
    """Let Ann be where `ap` says."""
    if ap == e.me:
        e.step(seen(), 0.0)
        e.step(seen(source=Source.NEIGHBOUR, address=ANN_IP), 0.0)
    else:
        e.step(PeerDelta(ap, generation, claims=(claim(ap, generation),)), 0.0)
    e.take_deltas()


# --- sync


def test_in_sync_needs_the_own_table_and_every_peer() -> None:
    e = Engine(domain())
    e.step(PeerSnapshot(AP2, 0), 0.0)
    e.step(FlowsListed({}), 0.0)
    assert not e.in_sync
    assert NoteSync(()) in e.step(PeerSnapshot(AP3, 0), 0.0)
    assert e.in_sync


def test_a_silent_peer_delays_sync_only_for_the_timeout() -> None:
    e = Engine(domain())
    e.step(FlowsListed({}), 0.0)
    e.step(PeerSnapshot(AP2, 0), 0.0)
    assert NoteSync((AP3,)) in e.step(SyncTimedOut(), 0.0)


def test_the_timeout_does_not_replace_the_own_table() -> None:
    e = Engine(domain())
    e.step(SyncTimedOut(), 0.0)
    assert not e.in_sync
    e.step(FlowsListed({}), 0.0)
    assert e.in_sync


# --- own flows


def test_own_flows_are_published_and_not_tunnelled() -> None:
    e = engine()
    effects = e.step(FlowsChanged(LAN, {tcp(1): NAT}), 0.0)
    assert effects == [Publish({LAN: {tcp(1): since(MAX_GENERATION)}}, (), 0)]
    assert e.take_deltas() == {}


def test_a_flow_notes_the_generation_of_its_clients_claim() -> None:
    e = engine()
    place_client(e, AP1)
    e.step(FlowsChanged(LAN, {tcp(1): NAT}), 0.0)
    place_client(e, AP2, generation=9)
    e.step(FlowsChanged(LAN, {tcp(1): NAT, tcp(2): NAT}), 0.0)
    assert e.snapshot()[0] == {LAN: {tcp(1): since(1), tcp(2): since(9)}}


def test_flows_from_before_the_start_are_older_than_any_claim() -> None:
    e = Engine(domain())
    e.step(FlowsListed({LAN: {tcp(1): NAT}}), 0.0)
    assert e.snapshot()[0] == {LAN: {tcp(1): since(0)}}


def test_our_flow_ends_where_another_anchor_has_the_better_right() -> None:
    e = engine()
    place_client(e, AP2, generation=5)
    e.step(seen(), 1.0)
    e.step(FlowsChanged(LAN, {tcp(1): NAT}), 0.0)
    e.take_deltas()
    effects = e.step(PeerDelta(AP2, 6, {LAN: {tcp(1): since(5)}}), 0.0)
    assert effects == [EndFlows(LAN, (tcp(1),))]
    assert e.take_deltas()[LAN].flows == {tcp(1): Change(None, AP2)}


def test_a_listing_publishes_only_the_difference() -> None:
    e = engine()
    e.step(FlowsChanged(LAN, {tcp(1): NAT, tcp(2): NAT}), 0.0)
    effects = e.step(FlowsListed({LAN: {tcp(2): NAT, tcp(3): NAT}}), 0.0)
    published = {tcp(1): None, tcp(3): since(MAX_GENERATION)}
    assert effects == [Publish({LAN: published}, (), 0)]


# --- roams


def test_a_new_client_is_claimed_and_gets_its_neighbour_entry() -> None:
    e = engine()
    assert claims(e.step(seen(), 0.0)) == [claim(AP1, 1, address=None)]
    learned = e.step(seen(source=Source.NEIGHBOUR, address=ANN_IP), 0.0)
    assert claims(learned) == [claim(AP1, 1)]
    assert e.take_deltas()[LAN].neighbours == {ANN_IP: Change(None, ANN)}


def test_a_client_that_arrives_is_claimed_above_the_highest_generation_seen() -> None:
    e = engine()
    place_client(e, AP2, generation=7)
    effects = e.step(seen(), 1.0)
    assert claims(effects) == [claim(AP1, 8)]
    delta = e.take_deltas()[LAN]
    assert delta.neighbours == {ANN_IP: Change(None, ANN)}
    assert delta.routes == {ANN_IP: Change(AP2, None)}
    assert delta.known == {ANN_IP: Change(None, ANN)}
    assert not delta.flows
    assert WelcomeClient(LAN, ANN, (ANN_IP,), ()) in effects


def test_a_client_that_leaves_is_forgotten_and_routed_to_its_new_ap() -> None:
    e = engine()
    place_client(e, AP1)
    effects = e.step(PeerDelta(AP3, 9, claims=(claim(AP3, 9),)), 1.0)
    assert ForgetClient(LAN, ANN, (ANN_IP,)) in effects
    assert AskClient(LAN, ANN, (ANN_IP,)) in effects  # it may be back already
    assert claims(effects) == [replace(claim(AP1, 1), outdone=True)]
    delta = e.take_deltas()[LAN]
    assert delta.neighbours == {ANN_IP: Change(ANN, None)}
    assert delta.routes == {ANN_IP: Change(None, AP3)}
    assert delta.known == {ANN_IP: Change(ANN, None)}


def test_a_roam_touches_no_session() -> None:
    e = engine()
    e.step(PeerDelta(AP2, 0, {LAN: {tcp(n): NAT for n in range(1000)}}), 0.0)
    place_client(e, AP2)
    e.step(seen(), 0.0)
    assert not e.take_deltas()[LAN].flows


def test_a_stale_claim_changes_nothing() -> None:
    e = engine()
    place_client(e, AP2, generation=7)
    assert e.step(PeerDelta(AP3, 6, claims=(claim(AP3, 6),)), 0.0) == []
    assert at(e) == AP2
    assert e.take_deltas() == {}


def test_a_late_claim_still_tells_the_clients_address() -> None:
    e = engine()
    e.step(PeerDelta(AP2, 5, claims=(claim(AP2, 5, address=None),)), 0.0)
    assert claims(e.step(seen(), 0.0)) == [claim(AP1, 6, address=None)]
    effects = e.step(PeerDelta(AP2, 5, claims=(claim(AP2, 5),)), 0.0)
    assert claims(effects) == [claim(AP1, 6)]
    assert e.take_deltas()[LAN].neighbours == {ANN_IP: Change(None, ANN)}
    assert e.step(PeerDelta(AP2, 5, claims=(claim(AP2, 5),)), 0.0) == []


def test_a_late_claim_takes_no_address_away_from_another_client() -> None:
    e = engine()
    e.step(PeerDelta(AP2, 5, claims=(claim(AP2, 5, BEN, ANN_IP),)), 0.0)
    e.step(seen(), 0.0)
    assert not claims(e.step(PeerDelta(AP3, 4, claims=(claim(AP3, 4),)), 0.0))


def test_the_same_generation_is_decided_by_the_ap_id() -> None:
    for order in ((AP2, AP3), (AP3, AP2)):
        e = engine()
        for ap in order:
            e.step(PeerDelta(ap, 4, claims=(claim(ap, 4),)), 0.0)
        assert at(e) == AP3


def test_a_roam_is_noted_with_the_flows_that_it_kept() -> None:
    e = engine()
    place_client(e, AP2, generation=3)
    e.step(PeerDelta(AP2, 3, {LAN: {tcp(1): NAT, tcp(2): NAT}}), 0.0)
    notes = [n for n in e.step(seen(), 1.0) if isinstance(n, NoteRoam)]
    assert notes == [NoteRoam(LAN, ANN, (ANN_IP,), AP2, AP1, 4, "fdb", 2)]


def test_every_state_and_source_has_a_verdict() -> None:
    assert set(SIGHTINGS) == {(where, source) for where in Where for source in Source}


@pytest.mark.parametrize(("state", "source"), SIGHTINGS)
def test_sightings_do_as_the_table_says(state: Where, source: Source) -> None:
    e = engine()
    if state is not Where.UNKNOWN:
        place_client(e, AP1 if state is Where.HERE else AP2)
    before = at(e)
    effects = e.step(seen(source=source, address=ANN_IP), 0.0)
    claimed = SIGHTINGS[state, source] is Verdict.CLAIM
    assert bool(claims(effects)) == claimed
    assert at(e) == (AP1 if claimed else before)


def test_packets_that_a_client_left_in_our_queues_do_not_bring_it_back() -> None:
    e = engine()
    place_client(e, AP1)
    e.step(PeerDelta(AP2, 9, claims=(claim(AP2, 9),)), 10.0)
    assert not claims(e.step(seen(source=Source.DATA, address=ANN_IP), 10.05))
    assert claims(e.step(seen(source=Source.DATA, address=ANN_IP), 10.2)) == [claim(AP1, 10)]


def test_an_address_that_two_aps_did_not_agree_on_is_learned_from_a_packet() -> None:
    e = engine()
    e.step(seen(), 0.0)
    assert claims(e.step(seen(source=Source.DATA, address=ANN_IP), 0.0)) == [claim(AP1, 1)]


@pytest.mark.parametrize("address", ["10.77.0.1", "10.77.0.0", "10.77.255.255", "192.0.2.1"])
def test_an_address_that_no_client_may_have_is_ignored(address: str) -> None:
    e = engine()
    assert e.step(seen(source=Source.NEIGHBOUR, address=IPv4Address(address)), 0.0) == []


def test_an_address_moves_with_the_newer_claim() -> None:
    e = engine()
    place_client(e, AP1)
    effects = e.step(seen(BEN, Source.NEIGHBOUR, ANN_IP), 0.0)
    assert claims(effects) == [claim(AP1, 2, BEN, ANN_IP)]
    assert e.take_deltas()[LAN].neighbours == {ANN_IP: Change(ANN, BEN)}
    e.step(FlowsChanged(LAN, {tcp(1): NAT}), 0.0)
    back = e.step(seen(ANN, Source.NEIGHBOUR, ANN_IP), 0.0)
    assert claims(back) == [claim(AP1, 3, ANN, ANN_IP)]
    assert EndFlows(LAN, (tcp(1),), Ending.OWNED, ANN) in back
    assert e.take_deltas()[LAN].neighbours == {ANN_IP: Change(BEN, ANN)}


def test_an_address_that_another_client_has_by_now_is_not_claimed_again() -> None:
    e = engine()
    place_client(e, AP1)
    e.step(PeerDelta(AP2, 7, claims=(claim(AP2, 7, BEN, ANN_IP),)), 0.0)
    e.step(PeerDelta(AP3, 8, claims=(claim(AP3, 8),)), 0.0)
    e.step(PeerDelta(AP2, 9, claims=(claim(AP2, 9, BEN, ANN_IP),)), 0.0)
    [said] = claims(e.step(seen(), 0.0))
    assert said == claim(AP1, 10, address=None)
    assert e.wanted()[LAN].routes == {ANN_IP: AP2}


# --- clients that leave


def test_a_silent_client_without_sessions_is_released() -> None:
    e = engine()
    place_client(e, AP1)
    [released] = claims(e.step(ClientAged(LAN, ANN), 0.0))
    assert released.released
    assert at(e) is None
    assert e.take_deltas()[LAN].neighbours == {ANN_IP: Change(ANN, None)}


def test_a_silent_client_stays_while_it_has_a_session_anywhere() -> None:
    e = engine()
    place_client(e, AP1)
    e.step(PeerDelta(AP2, 0, {LAN: {tcp(1): NAT}}), 0.0)
    assert not claims(e.step(ClientAged(LAN, ANN), 0.0))
    [released] = claims(e.step(PeerDelta(AP2, 0, {LAN: {tcp(1): None}}), 0.0))
    assert released.released


def test_clients_that_sleep_are_not_looked_at_with_every_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    e = engine()
    place_client(e, AP1)
    e.step(FlowsChanged(LAN, {tcp(1): NAT}), 0.0)
    e.step(ClientAged(LAN, ANN), 0.0)
    looked: list[Mac] = []
    is_needed = e.claims._is_needed

    def look(client: Client) -> bool:
        looked.append(client.claim.mac)
        return is_needed(client)

    monkeypatch.setattr(e.claims, "_is_needed", look)
    e.step(FlowsChanged(LAN, {tcp(2, BEN_IP): NAT}), 0.0)
    e.step(PeerDelta(AP2, 0, {LAN: {tcp(3, BEN_IP): NAT}}), 0.0)
    e.step(PeerDelta(AP2, 0, {LAN: {tcp(3, BEN_IP): None}}), 0.0)
    assert looked == []
    e.step(FlowsChanged(LAN, {tcp(1): None}), 0.0)
    assert looked == [ANN]


def test_a_silent_client_that_has_lost_its_address_is_released_though_that_one_is_in_use() -> None:
    e = engine()
    place_client(e, AP1)
    e.step(FlowsChanged(LAN, {tcp(1): NAT}), 0.0)
    e.step(ClientAged(LAN, ANN), 0.0)
    e.step(PeerDelta(AP2, 9, claims=(claim(AP2, 9, BEN, ANN_IP),)), 0.0)
    e.step(FlowsChanged(LAN, {tcp(2): NAT}), 0.0)
    assert e.clients[LAN].get(ANN) is None
    assert e.clients[LAN].get(BEN) is not None


def test_a_client_that_speaks_again_is_not_released() -> None:
    e = engine()
    place_client(e, AP1)
    e.step(FlowsChanged(LAN, {tcp(1): NAT}), 0.0)
    e.step(ClientAged(LAN, ANN), 0.0)
    e.step(seen(), 0.0)
    assert not claims(e.step(FlowsChanged(LAN, {tcp(1): None}), 0.0))


def test_a_late_claim_does_not_bring_a_released_client_back() -> None:
    e = engine()
    place_client(e, AP2, generation=5)
    e.step(PeerDelta(AP2, 6, claims=(Claim(LAN, ANN, AP2, 6, released=True),)), 0.0)
    e.step(PeerDelta(AP3, 4, claims=(claim(AP3, 4),)), 0.0)
    assert at(e) is None
    assert e.wanted()[LAN].routes == {}


def test_a_client_that_arrives_is_told_who_is_elsewhere() -> None:
    e = engine()
    e.step(PeerDelta(AP2, 6, claims=(claim(AP2, 6, BEN, BEN_IP),)), 0.0)
    effects = e.step(seen(), 0.0)
    assert WelcomeClient(LAN, ANN, (), (BEN_IP,)) in effects


# --- port forwards


def test_a_port_forward_is_published_as_a_standing_session() -> None:
    forward = Forward(6, 8080, ANN_IP, 80)
    e = Engine(domain(networks=(replace(lan(), forwards=(forward,)),)))
    e.step(FlowsListed({LAN: {tcp(1): NAT}}), 0.0)
    said = standing_sessions({forward.outside(IPv4Address(0)): forward.inside})
    assert e.snapshot()[0][LAN] == {tcp(1): since(0), **said}
    e.step(FlowsListed({}), 0.0)
    assert e.snapshot()[0][LAN] == said


def test_a_client_that_a_port_is_forwarded_to_is_not_released() -> None:
    forward = Forward(6, 8080, ANN_IP, 80)
    e = Engine(domain(networks=(replace(lan(), forwards=(forward,)),), aps=1))
    e.step(FlowsListed({}), 0.0)
    place_client(e, AP1)
    assert not claims(e.step(ClientAged(LAN, ANN), 0.0))


# --- peers


def test_a_lost_peers_sessions_stay() -> None:
    e = engine()
    e.step(PeerDelta(AP2, 0, {LAN: {tcp(1): NAT}}), 0.0)
    e.take_deltas()
    assert e.step(PeerDisconnected(AP2, "timeout"), 0.0) == [
        NotePeer(AP2, PeerState.LOST, "timeout")
    ]
    assert e.take_deltas() == {}
    assert e.wanted()[LAN].flows == {tcp(1): AP2}


def test_a_snapshot_changes_only_what_differs() -> None:
    e = engine()
    e.step(PeerDelta(AP2, 0, {LAN: {tcp(1): NAT, tcp(2): NAT}}), 0.0)
    e.take_deltas()
    e.step(PeerConnected(AP2), 0.0)
    e.step(PeerSnapshot(AP2, 0, {LAN: {tcp(2): NAT, tcp(3): NAT}}), 0.0)
    assert e.take_deltas()[LAN].flows == {tcp(1): Change(AP2, None), tcp(3): Change(None, AP2)}


def test_a_peer_that_starts_again_without_its_clients_has_lost_them() -> None:
    e = engine()
    place_client(e, AP2)
    e.step(PeerSnapshot(AP2, 0), 0.0)
    assert at(e) is None
    assert e.take_deltas()[LAN].routes == {ANN_IP: Change(AP2, None)}


def test_a_restarted_peers_clients_stay_where_they_are() -> None:
    e = engine()
    place_client(e, AP2)
    e.step(PeerSnapshot(AP2, 0, claims=(claim(AP2, 0),)), 0.0)
    assert at(e) == AP2
    assert e.take_deltas() == {}


def test_a_claim_that_a_restarted_peer_forgot_keeps_no_other_from_being_believed() -> None:
    e = engine()
    place_client(e, AP3, generation=7)
    e.step(PeerDelta(AP2, 6, claims=(claim(AP2, 6),)), 0.0)
    assert at(e) == AP3
    e.step(PeerSnapshot(AP3, 0), 0.0)
    assert at(e) == AP2


# --- a restart


def restarted() -> Engine:
    """An engine that found Ann's neighbour entry, Ben's route to AP2 and one session of AP3."""
    e = Engine(domain())
    e.step(FlowsListed({}), 0.0)
    adopted = KernelAdopted(
        LAN, {tcp(1): AP3}, {BEN_IP: AP2}, {ANN_IP: ANN}, elsewhere={BEN_IP: BEN}
    )
    e.step(adopted, 0.0)
    e.take_deltas()
    return e


def test_what_an_earlier_run_left_stays_until_its_owner_speaks() -> None:
    e = restarted()
    state = e.wanted()[LAN]
    assert (state.flows, state.routes, state.neighbours) == (
        {tcp(1): AP3},
        {BEN_IP: AP2},
        {ANN_IP: ANN},
    )
    assert (state.elsewhere, state.places) == ({BEN_IP: BEN}, {BEN_IP: AP2})
    e.step(PeerSnapshot(AP3, 0), 0.0)
    assert e.take_deltas()[LAN].flows == {tcp(1): Change(AP3, None)}
    e.step(PeerSnapshot(AP2, 0), 0.0)
    delta = e.take_deltas()[LAN]
    assert delta.routes == delta.places == {BEN_IP: Change(AP2, None)}
    assert delta.elsewhere == {BEN_IP: Change(BEN, None)}


def test_a_restarted_agent_claims_its_clients_again_at_the_clock_of_its_peers() -> None:
    e = restarted()
    e.step(PeerSnapshot(AP2, 41), 0.0)
    effects = e.step(PeerSnapshot(AP3, 40), 0.0)
    assert claims(effects) == [claim(AP1, 41)]
    assert not e.take_deltas()[LAN].neighbours


@pytest.mark.parametrize("other", [AP2, ApId("ap0")])
def test_what_a_restarted_agent_finds_yields_to_who_sees_the_client_at_that_moment(
    other: ApId,
) -> None:
    e = restarted()
    e.step(PeerSnapshot(AP2, 41), 0.0)
    e.step(PeerSnapshot(AP3, 41), 0.0)
    # Its peers have heard as much, and not yet what we have claimed by that.
    client = e.clients[LAN]
    assert client.merge(claim(other, 42), 0.0) is not None
    assert at(e) == other


def test_a_client_that_roams_before_we_are_in_sync_is_not_taken_back_by_an_older_sighting() -> None:
    e = restarted()
    e.step(PeerSnapshot(AP2, 40), 0.0)
    e.step(seen(), 0.0)
    e.step(PeerDelta(AP2, 41, claims=(claim(AP2, 41),)), 0.0)
    assert not claims(e.step(PeerSnapshot(AP3, 40), 0.0))
    assert at(e) == AP2


def test_but_by_one_that_came_later() -> None:
    e = restarted()
    e.step(PeerSnapshot(AP2, 40), 0.0)
    e.step(PeerDelta(AP2, 41, claims=(claim(AP2, 41),)), 0.0)
    e.step(seen(), 0.0)
    assert claims(e.step(PeerSnapshot(AP3, 40), 0.0)) == [claim(AP1, 42)]


def test_a_client_that_left_during_the_restart_is_given_up() -> None:
    e = restarted()
    effects = e.step(PeerSnapshot(AP2, 41, claims=(claim(AP2, 41),)), 0.0)
    gone = effects.index(ForgetClient(LAN, ANN, (ANN_IP,)))
    assert effects.index(AskClient(LAN, ANN, (ANN_IP,))) > gone
    assert not claims(e.step(PeerSnapshot(AP3, 40), 0.0))
    assert at(e) == AP2


def test_what_ages_before_sync_is_not_claimed_at_sync() -> None:
    e = restarted()
    e.step(seen(), 0.0)
    e.step(PeerSnapshot(AP2, 41, claims=(claim(AP2, 41),)), 0.0)
    e.step(ClientAged(LAN, ANN), 0.0)
    assert not claims(e.step(PeerSnapshot(AP3, 40), 0.0))
    assert at(e) == AP2


def test_a_client_seen_live_before_sync_is_claimed_at_sync() -> None:
    e = restarted()
    e.step(seen(), 0.0)
    e.step(PeerSnapshot(AP2, 41, claims=(claim(AP2, 41),)), 0.0)
    assert claims(e.step(PeerSnapshot(AP3, 40), 0.0)) == [claim(AP1, 42)]


def test_a_client_that_the_bridge_had_forgotten_at_the_start_is_released_at_sync() -> None:
    e = restarted()
    assert not claims(e.step(ClientAged(LAN, ANN), 0.0))
    e.step(PeerSnapshot(AP2, 7), 0.0)
    said = claims(e.step(PeerSnapshot(AP3, 3), 0.0))
    assert said[-1] == Claim(LAN, ANN, AP1, 8, released=True)


def test_what_the_bridge_held_at_the_start_is_no_proof() -> None:
    e = Engine(domain())
    e.step(FlowsListed({}), 0.0)
    e.step(ClientsFound(LAN, {ANN: frozenset({ANN_IP})}), 0.0)
    e.step(PeerSnapshot(AP2, 3, claims=(claim(AP2, 3),)), 0.0)
    assert not claims(e.step(PeerSnapshot(AP3, 0), 0.0))
    assert at(e) == AP2


def test_our_snapshot_holds_our_sessions_and_claims_only() -> None:
    e = engine()
    place_client(e, AP1)
    e.step(PeerDelta(AP2, 9, {LAN: {tcp(1): NAT}}, (claim(AP2, 9, BEN, BEN_IP),)), 0.0)
    e.step(FlowsChanged(LAN, {tcp(2): NAT}), 0.0)
    tables, own_claims = e.snapshot()
    assert tables == {LAN: {tcp(2): since(1)}}
    assert own_claims == [claim(AP1, 1)]


def test_an_unknown_event_is_our_own_bug() -> None:
    event: Event = "hello"  # type: ignore[assignment]
    with pytest.raises(TypeError):
        engine().step(event, 0.0)


def test_a_peer_is_idle_until_it_anchors_a_flow() -> None:
    e = engine()
    assert AP2 in e.idle_peers()
    e.step(PeerDelta(AP2, 0, {LAN: {tcp(1): NAT}}), 0.0)
    assert AP2 not in e.idle_peers()
    e.step(PeerDelta(AP2, 0, {LAN: {tcp(1): None}}), 0.0)
    assert AP2 in e.idle_peers()
