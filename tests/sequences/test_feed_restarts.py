"""The feed over restarts of either side, breaks, and more changes than the log remembers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apagent.core.desired import NetworkState, difference
from apagent.core.digest import checksum
from apagent.core.effects import Publish
from apagent.core.engine import Engine, PeerState
from apagent.core.events import (
    ClientSeen,
    Event,
    FlowsChanged,
    FlowsListed,
    KernelAdopted,
    PeerDelta,
    Source,
    SyncTimedOut,
)
from apagent.core.feed import FeedContents, FeedLog
from apagent.core.model import ApId, FlowKey, Nat
from apagent.peers.follower import Follower
from apagent.peers.publisher import Publisher, SharedDeltas
from apagent.v1 import peer_pb2 as pb
from tests.domains import ANN, ANN_IP, AP1, AP2, AP3, LAN, NAT, OTHER_NAT, claim, domain, tcp, udp
from tests.sequences.test_order import apply

KEYS = [*(tcp(n) for n in range(6)), *(udp(n) for n in range(6))]
CAPACITY = 8
"""Of the log: small, so that it is often exceeded."""


class Anchor:
    """AP1: its kernel, which goes on, and the agent of its present run."""

    def __init__(self) -> None:
        self.conntrack: dict[FlowKey, Nat] = {}
        self._epochs = count(1)
        self._clock = 0
        """What the peers tell a new run."""
        self.start()

    def start(self) -> None:
        """An agent comes up and finds what the kernel has."""
        self.engine = Engine(domain(AP1))
        self.log = FeedLog(next(self._epochs), self._contents, CAPACITY)
        self.step(FlowsListed({LAN: dict(self.conntrack)}))
        self.step(PeerDelta(AP2, self._clock))
        self.step(SyncTimedOut())

    def step(self, event: Event) -> None:
        effects = self.engine.step(event, 0.0)
        self._clock = self.engine.clock
        for effect in effects:
            if isinstance(effect, Publish):
                self.log.append(effect.tables, effect.claims, effect.clock, effect.anchor)

    def change(self, key: FlowKey, nat: Nat | None, *, told: bool = True) -> None:
        """A flow opens or closes in the kernel; the agent is told if it is up."""
        if nat is None:
            self.conntrack.pop(key, None)
        else:
            self.conntrack[key] = nat
        if told:
            self.step(FlowsChanged(LAN, {key: nat}))

    def see(self) -> None:
        """The client comes back from elsewhere: what opens now is of a later generation."""
        self.step(PeerDelta(AP2, 0, claims=(claim(AP2, self.engine.clock + 1),)))
        self.step(ClientSeen(LAN, ANN, Source.FDB))
        self.step(ClientSeen(LAN, ANN, Source.NEIGHBOUR, ANN_IP))

    def _contents(self) -> FeedContents:
        tables, claims = self.engine.snapshot()
        digests = self.engine.digests(AP1)
        return FeedContents(tables, claims, self.engine.clock, digests=digests)


class Subscriber:
    """Another AP: its kernel, its agent, and the feed of AP1 as far as it has come."""

    def __init__(self, me: ApId) -> None:
        self.me = me
        self.kernel = NetworkState()
        self.start()

    def start(self) -> None:
        """An agent comes up and adopts what the kernel has."""
        kernel = self.kernel
        self.engine = Engine(domain(self.me))
        self.follower = Follower(AP1, self.engine.domain.networks, self.engine.sessions)
        self.feed: Iterator[pb.FeedMessage] = iter(())
        flows, routes, elsewhere = dict(kernel.flows), dict(kernel.routes), dict(kernel.elsewhere)
        sockets = dict(kernel.sockets)
        adopted = KernelAdopted(LAN, flows, routes, {}, sockets=sockets, elsewhere=elsewhere)
        for event in (FlowsListed({}), adopted):
            self.engine.step(event, 0.0)
        self.engine.take_deltas()

    def connect(self, anchor: Anchor) -> None:
        for event in self.follower.lose("again"):
            self.engine.step(event, 0.0)
        request = pb.WatchRequest.FromString(self.follower.request(self.me).SerializeToString())
        self.feed = Publisher(
            SharedDeltas(AP1), anchor.log, request.protocol_version, request
        ).news()

    def hear(self, messages: int | None = None) -> None:
        """Take some messages in, or all that there are."""
        for message in islice(self.feed, messages):
            sent = pb.FeedMessage.FromString(message.SerializeToString())
            for event in self.follower.take_untrusted(sent):
                self.engine.step(event, 0.0)
                apply(self.kernel, self.engine)

    @property
    def table(self) -> dict[FlowKey, Nat]:
        """What it holds of AP1's sessions."""
        return dict(self.engine.sessions[LAN].table(AP1))


def assert_equal(anchor: Anchor, subscriber: Subscriber) -> None:
    own = dict(anchor.engine.sessions[LAN].table(AP1))
    assert subscriber.table == own
    theirs = checksum(subscriber.engine.digests(AP1))
    assert theirs == checksum(anchor.engine.digests(AP1))
    assert not difference(subscriber.kernel, subscriber.engine.wanted()[LAN])
    assert subscriber.follower.state is PeerState.IN_SYNC


flows = st.tuples(st.sampled_from(KEYS), st.sampled_from([NAT, OTHER_NAT, None]))
actions = st.one_of(
    st.tuples(st.just("flow"), flows),
    st.tuples(st.just("see")),
    st.tuples(st.just("restart"), st.lists(flows, max_size=4)),
    st.tuples(st.just("connect"), st.sampled_from([0, 1])),
    st.tuples(st.just("hear"), st.sampled_from([0, 1]), st.sampled_from([1, 2, None])),
    st.tuples(st.just("restart subscriber"), st.sampled_from([0, 1])),
)


def act(anchor: Anchor, subscribers: list[Subscriber], action: tuple[Any, ...]) -> None:
    match action:
        case ("flow", (key, nat)):
            anchor.change(key, nat)
        case ("see",):
            anchor.see()
        case ("restart", edits):
            for subscriber in subscribers:
                subscriber.feed = iter(())
            for key, nat in edits:
                anchor.change(key, nat, told=False)
            anchor.start()
        case ("connect", index):
            subscribers[index].connect(anchor)
        case ("hear", index, messages):
            subscribers[index].hear(messages)
        case ("restart subscriber", index):
            subscribers[index].start()


@settings(max_examples=500, deadline=None)
@given(st.lists(actions, max_size=40))
def test_after_quiet_all_hold_the_anchors_table(todo: list[tuple[Any, ...]]) -> None:
    anchor, subscribers = Anchor(), [Subscriber(AP2), Subscriber(AP3)]
    for action in todo:
        act(anchor, subscribers, action)
    for subscriber in subscribers:
        subscriber.connect(anchor)
        subscriber.hear()
        assert_equal(anchor, subscriber)


@pytest.fixture
def many() -> tuple[Anchor, Subscriber]:
    """AP1 with a thousand flows of some generations, and a subscriber that knows them."""
    anchor, subscriber = Anchor(), Subscriber(AP2)
    for port in range(1000):
        if port % 200 == 0:
            anchor.see()
        anchor.change(tcp(port), NAT)
    subscriber.connect(anchor)
    subscriber.hear()
    assert_equal(anchor, subscriber)
    return anchor, subscriber


def test_of_a_restarted_agent_the_difference_travels(many: tuple[Anchor, Subscriber]) -> None:
    anchor, subscriber = many
    received = subscriber.follower.changes
    for port in range(10):
        anchor.change(tcp(port), None, told=False)
        anchor.change(tcp(5000 + port), NAT, told=False)
    anchor.start()
    anchor.see()
    anchor.change(tcp(6000), NAT)
    subscriber.connect(anchor)
    subscriber.hear()
    assert_equal(anchor, subscriber)
    assert (subscriber.follower.snapshots, subscriber.follower.differences) == (1, 1)
    assert 11 <= subscriber.follower.changes - received < 80


def test_nothing_travels_where_nothing_has_changed(many: tuple[Anchor, Subscriber]) -> None:
    anchor, subscriber = many
    received = subscriber.follower.changes
    anchor.start()
    subscriber.connect(anchor)
    subscriber.hear()
    assert_equal(anchor, subscriber)
    assert subscriber.follower.changes == received


def test_beyond_the_log_the_difference_travels(many: tuple[Anchor, Subscriber]) -> None:
    anchor, subscriber = many
    received = subscriber.follower.changes
    for port in range(2 * CAPACITY):
        anchor.change(tcp(port), OTHER_NAT)
    subscriber.connect(anchor)
    subscriber.hear()
    assert_equal(anchor, subscriber)
    assert subscriber.follower.differences == 1
    assert 2 * CAPACITY <= subscriber.follower.changes - received < 100


def test_what_a_stream_has_told_is_held_when_it_falls_behind(
    many: tuple[Anchor, Subscriber],
) -> None:
    anchor, subscriber = many
    request = subscriber.follower.request(AP2)
    publisher = Publisher(SharedDeltas(AP1), anchor.log, request.protocol_version, request)

    def hear() -> None:
        subscriber.feed = publisher.news()
        subscriber.hear()

    hear()
    anchor.change(tcp(5000), NAT)
    hear()
    for port in range(5000, 5000 + 2 * CAPACITY):
        anchor.change(tcp(port), None if port == 5000 else NAT)
        anchor.change(tcp(port), None)
    hear()
    assert_equal(anchor, subscriber)


def test_a_restarted_subscriber_with_a_good_map_changes_nothing_in_the_kernel(
    many: tuple[Anchor, Subscriber],
) -> None:
    anchor, subscriber = many
    before = dict(subscriber.kernel.flows)
    subscriber.start()
    subscriber.connect(anchor)
    for message in subscriber.feed:
        for event in subscriber.follower.take_untrusted(message):
            subscriber.engine.step(event, 0.0)
            delta = subscriber.engine.take_deltas()
            assert not any(d.flows or d.sockets for d in delta.values())
    assert subscriber.engine.wanted()[LAN].flows == before
    assert subscriber.table == dict(anchor.engine.sessions[LAN].table(AP1))
