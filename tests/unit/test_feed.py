"""The feed: bounded, folded, and the same for every subscriber."""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from apagent.core.feed import MAX_CHANGES, FeedContents, FeedDelta, FeedLog
from apagent.core.model import (
    TCP,
    ApId,
    Claim,
    Flow,
    FlowKey,
    Mac,
    Nat,
    NetworkName,
    Translation,
)

EPOCH = 7
LAN = NetworkName("lan")
ME = ApId("ap1")
MACS = [Mac(f"02:00:00:00:00:0{i}") for i in range(3)]


def key(n: int) -> FlowKey:
    return Flow(TCP, IPv4Address("10.77.0.2"), n, IPv4Address("198.51.100.1"), 443).key


def nat(n: int) -> Nat:
    return Translation(IPv4Address("192.0.2.1"), n).packed


def claim(mac: Mac, generation: int) -> Claim:
    return Claim(LAN, mac, ME, generation)


class Writer:
    """An AP's own tables and their feed, changed together."""

    def __init__(self, capacity: int = 1000) -> None:
        self.sessions: dict[FlowKey, Nat] = {}
        self.claims: dict[Mac, Claim] = {}
        self.clock = 0
        self.log = FeedLog(EPOCH, self.contents, capacity)

    def contents(self) -> FeedContents:
        return FeedContents({LAN: self.sessions}, list(self.claims.values()), self.clock)

    def write(self, changes: dict[FlowKey, Nat | None], claims: tuple[Claim, ...] = ()) -> None:
        merge(self.sessions, changes)
        for one in claims:
            self.claims[one.mac] = one
            self.clock = max(self.clock, one.generation)
        self.log.append({LAN: changes}, claims, self.clock)


class Reader:
    """A subscriber: its copy of the tables, and its position."""

    def __init__(self, log: FeedLog) -> None:
        self.log = log
        self.epoch = self.sequence = 0
        self.sessions: dict[FlowKey, Nat] = {}
        self.claims: dict[Mac, Claim] = {}
        self.snapshots = 0

    def read(self) -> None:
        """One message's worth."""
        delta = self.log.since(self.epoch, self.sequence)
        if delta is None:
            snapshot = self.log.snapshot()
            self.sessions = dict(snapshot.contents.tables[LAN])
            self.claims = {c.mac: c for c in snapshot.contents.claims}
            self.epoch, self.sequence = self.log.epoch, snapshot.sequence
            self.snapshots += 1
            return
        assert delta.follows == self.sequence
        assert size(delta) <= MAX_CHANGES
        merge(self.sessions, dict(delta.tables.get(LAN, {})))
        self.claims.update({c.mac: c for c in delta.claims})
        self.sequence = delta.sequence

    def catch_up(self) -> None:
        while (self.epoch, self.sequence) != (self.log.epoch, self.log.sequence):
            self.read()


def merge(table: dict[FlowKey, Nat], changes: dict[FlowKey, Nat | None]) -> None:
    for flow, translation in changes.items():
        if translation is None:
            table.pop(flow, None)
        else:
            table[flow] = translation


def size(delta: FeedDelta) -> int:
    return sum(map(len, delta.tables.values())) + len(delta.claims)


def test_a_subscriber_that_is_up_to_date_gets_an_empty_delta() -> None:
    log = Writer().log
    assert log.since(EPOCH, 0) == FeedDelta(0, 0, 0)


def test_another_epoch_or_a_position_ahead_needs_a_snapshot() -> None:
    log = Writer().log
    assert log.since(0, 0) is None
    assert log.since(EPOCH, 1) is None


def test_batches_since_the_position_are_folded_into_one_delta() -> None:
    writer = Writer()
    writer.write({key(1): nat(1)})
    writer.write({key(2): nat(2)}, (claim(MACS[0], 1),))
    writer.write({key(1): None}, (claim(MACS[0], 2),))
    delta = writer.log.since(EPOCH, 1)
    assert delta == FeedDelta(1, 3, 2, {LAN: {key(2): nat(2), key(1): None}}, (claim(MACS[0], 2),))


def test_a_large_batch_takes_several_deltas() -> None:
    writer = Writer(capacity=10_000)
    writer.write({key(n): nat(n) for n in range(3 * MAX_CHANGES + 1)})
    reader = Reader(writer.log)
    reader.epoch = EPOCH
    reader.catch_up()
    assert reader.snapshots == 0
    assert reader.sessions == writer.sessions
    assert writer.log.sequence == 4


def test_what_is_beyond_the_capacity_is_forgotten() -> None:
    writer = Writer(capacity=3)
    for n in range(5):
        writer.write({key(n): nat(n)})
    assert writer.log.since(EPOCH, 1) is None
    delta = writer.log.since(EPOCH, 2)
    assert delta is not None
    assert size(delta) == 3


def test_a_batch_larger_than_the_capacity_costs_a_snapshot() -> None:
    writer = Writer(capacity=3)
    writer.write({key(n): nat(n) for n in range(4)})
    assert writer.log.since(EPOCH, 0) is None
    assert writer.log.since(EPOCH, 1) == FeedDelta(1, 1, 0)


def test_nothing_changed_is_no_batch_but_its_clock_travels_with_the_next() -> None:
    writer = Writer()
    writer.log.append({LAN: {}}, (), 9)
    assert writer.log.sequence == 0
    writer.write({key(1): nat(1)})
    delta = writer.log.since(EPOCH, 0)
    assert delta is not None
    assert delta.clock == 9


def test_a_snapshot_does_not_change_afterwards() -> None:
    writer = Writer()
    writer.write({key(1): nat(1)})
    snapshot = writer.log.snapshot()
    writer.write({key(1): None})
    assert snapshot.contents.tables == {LAN: {key(1): nat(1)}}
    assert snapshot.sequence == 1


def test_listeners_are_told_of_batches_until_they_leave() -> None:
    writer = Writer()
    told: list[int] = []
    unsubscribe = writer.log.subscribe(lambda: told.append(writer.log.sequence))
    writer.write({key(1): nat(1)})
    writer.write({})
    unsubscribe()
    writer.write({key(2): nat(2)})
    assert told == [1]


changes_ = st.dictionaries(
    st.integers(0, 9).map(key), st.none() | st.integers(1, 99).map(nat), max_size=6
)
writes = st.tuples(
    st.just("write"), changes_, st.lists(st.sampled_from(MACS), max_size=2, unique=True)
)
reads = st.tuples(st.just("read"), st.integers(0, 2))


@settings(max_examples=300, deadline=None)
@given(st.lists(writes | reads, max_size=60), st.integers(1, 40))
def test_whoever_reads_when_it_likes_ends_with_the_writers_tables(
    script: list[Any], capacity: int
) -> None:
    writer = Writer(capacity)
    readers = [Reader(writer.log) for _ in range(3)]
    for step in script:
        if step[0] == "read":
            readers[step[1]].read()
        else:
            claims = tuple(claim(mac, writer.clock + 1) for mac in step[2])
            writer.write(step[1], claims)
    for reader in readers:
        reader.catch_up()
        assert reader.sessions == writer.sessions
        assert reader.claims == writer.claims


def test_subscribers_that_keep_up_share_a_delta() -> None:
    writer = Writer()
    writer.write({key(1): nat(1)})
    assert writer.log.since(EPOCH, 0) is writer.log.since(EPOCH, 0)
