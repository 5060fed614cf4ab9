"""The same end state, whatever the order, repetition and splitting of what led there."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from apagent.core.desired import NetworkState, difference
from apagent.core.effects import EndFlows, Publish
from apagent.core.engine import Engine
from apagent.core.events import (
    ClientSeen,
    Event,
    FlowsChanged,
    FlowsListed,
    PeerDelta,
    PeerSnapshot,
    Source,
)
from apagent.core.model import TRANSLATION, ApId, Claim, Mac
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
    OTHER_NAT,
    claim,
    domain,
    tcp,
    udp,
)

KEYS = [tcp(1), tcp(2), udp(1), udp(1, remote="198.51.100.11"), tcp(1, client=BEN_IP)]
ADDRESS = {ANN: ANN_IP, BEN: BEN_IP}


def run(events: list[Event]) -> Engine:
    e = Engine(domain())
    for event in events:
        e.step(event, 0.0)
    return e


def state(e: Engine) -> tuple[object, ...]:
    claims = {client.claim.mac: client.claim for client in e.clients[LAN]}
    # Under which claim a flow was opened depends on when we learned of it: real order counts there.
    own = {key: nat[TRANSLATION] for key, nat in e.snapshot()[0][LAN].items()}
    return e.wanted(), own, claims


STREAMS: list[list[Event]] = [
    [
        FlowsListed({LAN: {tcp(1): NAT}}),
        FlowsChanged(LAN, {udp(1): NAT, tcp(1): None}),
        FlowsChanged(LAN, {tcp(2): NAT}),
    ],
    [
        PeerSnapshot(AP2, 3, {LAN: {tcp(2): OTHER_NAT}}, (claim(AP2, 3),)),
        PeerDelta(AP2, 3, {LAN: {tcp(2): None, udp(1): OTHER_NAT}}),
        PeerDelta(AP2, 6, claims=(claim(AP2, 6, BEN, BEN_IP),)),
    ],
    [
        PeerSnapshot(AP3, 4, {LAN: {tcp(1): NAT}}, (claim(AP3, 4), claim(AP3, 5, BEN, BEN_IP))),
        PeerDelta(AP3, 4, {LAN: {tcp(1): None}}),
    ],
]


def interleavings(streams: list[list[Event]]) -> list[list[Event]]:
    labels = [i for i, stream in enumerate(streams) for _ in stream]
    result = []
    for order in set(permutations(labels)):
        iterators = [iter(stream) for stream in streams]
        result.append([next(iterators[i]) for i in order])
    return result


def test_every_interleaving_of_independent_sources_ends_alike() -> None:
    expected = state(run([event for stream in STREAMS for event in stream]))
    for events in interleavings(STREAMS):
        assert state(run(events)) == expected


def test_events_that_are_repeated_change_nothing() -> None:
    events = [event for stream in STREAMS for event in stream]
    doubled = [event for event in events for _ in range(2)]
    assert state(run(doubled)) == state(run(events))


def test_batches_may_be_split() -> None:
    whole = {tcp(n): NAT for n in range(20)} | {udp(n): NAT for n in range(20)}
    one = run([FlowsListed({}), FlowsChanged(LAN, whole)])
    many = run([FlowsListed({}), *(FlowsChanged(LAN, {k: n}) for k, n in whole.items())])
    assert state(one) == state(many)


def test_a_snapshot_equals_the_deltas_that_it_sums_up() -> None:
    deltas = run([PeerDelta(AP2, 1, {LAN: {k: NAT}}, (claim(AP2, 1),)) for k in KEYS])
    snapshot = run([PeerSnapshot(AP2, 1, {LAN: dict.fromkeys(KEYS, NAT)}, (claim(AP2, 1),))])
    assert state(deltas) == state(snapshot)


def apply(kernel: NetworkState, e: Engine) -> None:
    for delta in e.take_deltas().values():
        for part in (
            "flows",
            "sockets",
            "known",
            "home",
            "elsewhere",
            "places",
            "routes",
            "neighbours",
        ):
            table = getattr(kernel, part)
            for key, change in getattr(delta, part).items():
                assert table.get(key) == change.old
                if change.new is None:
                    del table[key]
                else:
                    table[key] = change.new


@dataclass
class World:
    """Engines of all APs, with a queue of undelivered messages for each direction."""

    engines: dict[ApId, Engine] = field(default_factory=dict)
    links: dict[tuple[ApId, ApId], deque[Event]] = field(default_factory=dict)
    kernels: dict[ApId, NetworkState] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for me in (AP1, AP2, AP3):
            self.engines[me] = Engine(domain(me))
            self.kernels[me] = NetworkState()
            self.engines[me].step(FlowsListed({}), 0.0)
        for a, b in permutations(self.engines, 2):
            self.links[a, b] = deque([PeerSnapshot(a, 0)])
        for ap in self.engines:
            self.links[ap, ap] = deque()  # what the kernel is about to report
        self.settle()

    def step(self, ap: ApId, event: Event) -> None:
        for effect in self.engines[ap].step(event, 0.0):
            if isinstance(effect, EndFlows):
                gone: Event = FlowsChanged(LAN, dict.fromkeys(effect.flows))
                self.links[ap, ap].append(gone)
            if isinstance(effect, Publish):
                for a, b in self.links:
                    if a == ap != b:
                        self.links[a, b].append(
                            PeerDelta(ap, effect.clock, dict(effect.tables), effect.claims)
                        )
        apply(self.kernels[ap], self.engines[ap])

    def deliver(self, a: ApId, b: ApId) -> None:
        if self.links[a, b]:
            self.step(b, self.links[a, b].popleft())

    def resync(self, a: ApId, b: ApId) -> None:
        """Lose what is under way from a to b and send a snapshot instead."""
        tables, claims = self.engines[a].snapshot()
        copies = {name: dict(sessions) for name, sessions in tables.items()}
        self.links[a, b] = deque([PeerSnapshot(a, self.engines[a].clock, copies, tuple(claims))])

    def settle(self) -> None:
        while any(self.links.values()):
            for link in self.links:
                self.deliver(*link)


aps = st.sampled_from([AP1, AP2, AP3])
actions = st.one_of(
    st.tuples(st.just("see"), aps, st.sampled_from([ANN, BEN])),
    st.tuples(st.just("flow"), aps, st.sampled_from(KEYS), st.booleans()),
    st.tuples(st.just("deliver"), st.permutations([AP1, AP2, AP3])),
    st.tuples(st.just("resync"), st.permutations([AP1, AP2, AP3])),
)


def act(world: World, action: tuple[Any, ...]) -> None:
    match action:
        case ("see", ap, mac):
            world.step(ap, ClientSeen(LAN, mac, Source.FDB))
            world.step(ap, ClientSeen(LAN, mac, Source.NEIGHBOUR, ADDRESS[mac]))
        case ("flow", ap, key, opened):
            world.step(ap, FlowsChanged(LAN, {key: NAT if opened else None}))
        case ("deliver", (a, b, _)):
            world.deliver(a, b)
        case ("resync", (a, b, _)):
            world.resync(a, b)


def places(e: Engine) -> dict[Mac, Claim]:
    return {client.claim.mac: client.claim for client in e.clients[LAN]}


@settings(max_examples=300, deadline=None)
@given(st.lists(actions, max_size=60))
def test_after_quiet_all_aps_agree(todo: list[tuple[object, ...]]) -> None:
    world = World()
    for action in todo:
        act(world, action)
    world.settle()
    first = world.engines[AP1]
    for ap, e in world.engines.items():
        assert places(e) == places(first)
        for anchor in world.engines:
            assert e.sessions[LAN].table(anchor) == first.sessions[LAN].table(anchor)
        assert not difference(world.kernels[ap], e.wanted()[LAN])
    anchors = [key for anchor in world.engines for key in first.sessions[LAN].table(anchor)]
    assert len(anchors) == len(set(anchors)), "a flow has one anchor"
    here = [ap for ap in world.engines if ANN_IP in world.kernels[ap].neighbours]
    assert len(here) <= 1
