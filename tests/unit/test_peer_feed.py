"""Server and subscriber of the peer feed over a real gRPC loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager, suppress
from ipaddress import IPv4Address, IPv4Network
from typing import Any, Self

import grpc
import pytest

from apagent.config import Endpoint
from apagent.core.domain import Network
from apagent.core.engine import PeerState
from apagent.core.events import PeerConnected, PeerDelta, PeerDisconnected, PeerPart, PeerSnapshot
from apagent.core.feed import FeedContents, FeedLog
from apagent.core.model import (
    TCP,
    AnchorStatement,
    ApId,
    Claim,
    Flow,
    FlowKey,
    Mac,
    NetworkName,
    SessionChanges,
    Sessions,
    Translation,
    stamped,
)
from apagent.core.session_tables import SessionTables
from apagent.errors import ApagentError, NeedsError, PeerFault
from apagent.peers import client, versions
from apagent.peers.client import Backoff, PeerSubscription
from apagent.peers.convert import Statements
from apagent.peers.follower import BOUNDS, Bounds, Follower, PeerEvent
from apagent.peers.keepalive import Keepalive
from apagent.peers.server import PeerFeedServer
from apagent.peers.snapshot import SnapshotParts
from apagent.v1 import peer_pb2 as pb
from apagent.v1 import peer_pb2_grpc

ME, PEER = ApId("ap1"), ApId("ap2")
LAN = NetworkName("lan")
NETWORK = Network(
    LAN, "br-lan", IPv4Network("10.77.0.0/16"), IPv4Address("10.77.0.1"), 77, "wan", None
)
NAT = Translation(IPv4Address("192.0.2.1"), 50000).packed
OTHER_NAT = Translation(IPv4Address("192.0.2.1"), 50001).packed
CLAIM = Claim(LAN, Mac("02:00:00:00:00:01"), PEER, 1, frozenset({IPv4Address("10.77.0.2")}))
LOOPBACK = "127.0.0.1"
PATIENCE_S = 10.0
FAST = Keepalive(idle_ms=100, answer_ms=300, connect_ms=1000)


def key(port: int) -> FlowKey:
    return Flow(TCP, IPv4Address("10.77.0.2"), port, IPv4Address("198.51.100.1"), 443).key


def take_in(tables: dict[NetworkName, SessionTables], event: PeerEvent) -> None:
    """What the engine does with sessions."""
    if isinstance(event, PeerPart | PeerDelta):
        for network, changes in event.tables.items():
            tables[network].apply(event.peer, changes)
    elif isinstance(event, PeerSnapshot):
        assert event.tables is None, "the parts have said it"


class PeerAp:
    """The peer: tables, their feed, and a server that can come and go."""

    def __init__(self, epoch: int = 1, capacity: int = 100_000) -> None:
        self.tables = {LAN: SessionTables(PEER, [])}
        self.claims: list[Claim] = []
        self.log = FeedLog(epoch, self.contents, capacity)
        self.port = 0
        self._server: PeerFeedServer | None = None

    @property
    def sessions(self) -> Sessions:
        return self.tables[LAN].table(PEER)

    def contents(self) -> FeedContents:
        digests = {name: tables.digest(PEER) for name, tables in self.tables.items()}
        tables = {name: tables.table(PEER) for name, tables in self.tables.items()}
        return FeedContents(tables, self.claims, 3, digests=digests)

    def open(self, *ports: int) -> None:
        self.change({key(port): NAT for port in ports})

    def change(self, changes: SessionChanges) -> None:
        self.log.append({LAN: self.tables[LAN].apply(PEER, changes)}, (), 3)

    async def start(self) -> None:
        self._server = PeerFeedServer(PEER, self.log, Endpoint(LOOPBACK, self.port), FAST)
        self.port = await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop()
            self._server = None


class Subscriber:
    """The subscription under test, its events, and a way to wait for one."""

    def __init__(self, port: int, bounds: Bounds = BOUNDS) -> None:
        self.events: list[PeerEvent] = []
        self._news = asyncio.Event()
        self.tables = {LAN: SessionTables(ME, [PEER])}
        self.feed = Follower(PEER, [NETWORK], self.tables, bounds)
        self.subscription = PeerSubscription(
            ME,
            Endpoint(LOOPBACK, port),
            self.feed,
            self._emit,
            backoff=Backoff(0.01, 0.02, jitter=lambda: 0.5),
            keepalive=FAST,
        )

    def _emit(self, event: PeerEvent) -> None:
        take_in(self.tables, event)
        self.events.append(event)
        self._news.set()

    @property
    def sessions(self) -> Sessions:
        """What we hold of the peer's."""
        return self.tables[LAN].table(PEER)

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not holds():
                self._news.clear()
                await self._news.wait()

    async def next(self, kind: type[PeerEvent]) -> Any:
        """The next event, which is of this kind; parts of snapshots are passed over."""
        event: PeerEvent = PeerPart(PEER)
        while isinstance(event, PeerPart):
            await self.until(lambda: bool(self.events))
            event = self.events.pop(0)
        assert isinstance(event, kind), event
        return event


@asynccontextmanager
async def started(ap: PeerAp) -> AsyncIterator[PeerAp]:
    await ap.start()
    try:
        yield ap
    finally:
        await ap.stop()


@asynccontextmanager
async def running(port: int, bounds: Bounds = BOUNDS) -> AsyncIterator[Subscriber]:
    subscriber = Subscriber(port, bounds)
    task = asyncio.create_task(subscriber.subscription.run(), name="subscription under test")
    try:
        yield subscriber
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def scene(play: Callable[[PeerAp, Subscriber], Coroutine[Any, Any, None]], **peer: int) -> None:
    """Run `play` with a started peer and a running subscription."""

    async def main() -> None:
        async with started(PeerAp(**peer)) as ap, running(ap.port) as subscriber:
            await play(ap, subscriber)

    asyncio.run(main())


def test_a_new_subscriber_gets_a_snapshot_then_deltas() -> None:
    async def play(ap: PeerAp, subscriber: Subscriber) -> None:
        await subscriber.next(PeerConnected)
        await subscriber.next(PeerSnapshot)
        assert subscriber.sessions == {}
        assert subscriber.feed.state is PeerState.IN_SYNC
        ap.open(1, 2)
        delta = await subscriber.next(PeerDelta)
        assert delta == PeerDelta(PEER, 3, {LAN: {key(1): NAT, key(2): NAT}})
        ap.log.append({LAN: {key(1): None}}, (CLAIM,), 4)
        delta = await subscriber.next(PeerDelta)
        assert delta == PeerDelta(PEER, 4, {LAN: {key(1): None}}, (CLAIM,))
        feed = subscriber.feed
        assert (feed.epoch, feed.sequence, feed.snapshots, feed.deltas) == (1, 2, 1, 2)

    scene(play)


def test_a_large_snapshot_ends_with_one_event() -> None:
    async def main() -> None:
        ap = PeerAp()
        ap.open(*range(1, 5000))
        ap.claims.append(CLAIM)
        async with started(ap), running(ap.port) as subscriber:
            await subscriber.next(PeerConnected)
            snapshot = await subscriber.next(PeerSnapshot)
            assert snapshot == PeerSnapshot(PEER, 3, None, (CLAIM,), AnchorStatement())
            assert subscriber.sessions == ap.sessions

    asyncio.run(main())


def test_a_broken_feed_goes_on_where_it_stopped() -> None:
    async def play(ap: PeerAp, subscriber: Subscriber) -> None:
        await subscriber.next(PeerConnected)
        await subscriber.next(PeerSnapshot)
        await ap.stop()
        lost = await subscriber.next(PeerDisconnected)
        assert lost.reason == subscriber.feed.reason != ""
        assert subscriber.feed.state is PeerState.LOST
        ap.open(1)
        await ap.start()
        await subscriber.next(PeerConnected)
        assert (await subscriber.next(PeerDelta)).tables == {LAN: {key(1): NAT}}
        assert subscriber.feed.snapshots == 1
        assert subscriber.feed.reason == ""

    scene(play)


def test_a_resumed_feed_answers_although_nothing_is_new() -> None:
    async def play(ap: PeerAp, subscriber: Subscriber) -> None:
        await subscriber.next(PeerConnected)
        await subscriber.next(PeerSnapshot)
        await ap.stop()
        await subscriber.next(PeerDisconnected)
        await ap.start()
        await subscriber.next(PeerConnected)
        assert await subscriber.next(PeerDelta) == PeerDelta(PEER, 3)
        assert subscriber.feed.state is PeerState.IN_SYNC

    scene(play)


def test_a_subscriber_beyond_the_log_gets_what_differs() -> None:
    async def play(ap: PeerAp, subscriber: Subscriber) -> None:
        ap.open(*range(1, 101))
        await subscriber.until(lambda: len(subscriber.sessions) == 100)
        await ap.stop()
        await subscriber.until(lambda: subscriber.feed.state is PeerState.LOST)
        before = subscriber.feed.changes
        ap.open(101, 102, 103)
        ap.change({key(1): None, key(2): stamped(NAT, 7)})
        await ap.start()
        await subscriber.until(lambda: subscriber.feed.differences == 1)
        assert subscriber.sessions == ap.sessions
        assert subscriber.feed.snapshots == 1
        assert 4 <= subscriber.feed.changes - before < 50

    scene(play, capacity=2)


def test_of_a_restarted_peer_only_the_difference_travels() -> None:
    async def play(ap: PeerAp, subscriber: Subscriber) -> None:
        ap.change({key(port): stamped(NAT, port) for port in range(1, 5001)})
        await subscriber.until(lambda: len(subscriber.sessions) == 5000)
        await ap.stop()
        await subscriber.until(lambda: subscriber.feed.state is PeerState.LOST)
        before = subscriber.feed.changes
        again = PeerAp(epoch=2)
        again.open(*range(11, 5011))
        again.change({key(20_000): stamped(NAT, 8)})
        again.port = ap.port
        async with started(again):
            await subscriber.until(lambda: subscriber.feed.differences == 1)
            assert subscriber.sessions == again.sessions
            assert subscriber.feed.epoch == 2
            assert subscriber.feed.snapshots == 1
            assert 11 <= subscriber.feed.changes - before < 100
            last = subscriber.events[-1]
            assert last == PeerSnapshot(PEER, 3, None, anchor=AnchorStatement())

    scene(play)


def test_a_snapshot_holds_part_by_part_and_lets_others_run() -> None:
    async def main() -> None:
        ap = PeerAp()
        ap.open(*range(1, 5001))
        async with started(ap), running(ap.port) as subscriber:
            turns = await turns_between_parts(subscriber, lambda: subscriber.feed.snapshots == 1)
            assert len(turns) == 10
            assert len(subscriber.sessions) == 5000

            await ap.stop()
            again = PeerAp(epoch=2)
            again.change({key(port): OTHER_NAT for port in range(1, 5001)})
            again.port = ap.port
            async with started(again):
                turns = await turns_between_parts(
                    subscriber, lambda: subscriber.feed.differences == 1
                )
                assert len(turns) >= 10
                assert subscriber.sessions == again.sessions

    asyncio.run(main())


async def turns_between_parts(subscriber: Subscriber, done: Callable[[], bool]) -> list[int]:
    """How often another task had its turn before each part; it always had one."""
    turns: list[int] = []
    parts = 0
    while not done():
        await asyncio.sleep(0)
        now = sum(isinstance(event, PeerPart) for event in subscriber.events)
        assert now - parts <= 1, "two parts, and nobody else had a turn"
        if now != parts:
            turns.append(now)
        parts = now
    subscriber.events.clear()
    return turns


def test_what_was_heard_of_a_snapshot_that_broke_off_stays() -> None:
    sessions = [_session(1), _session(2)]
    part = sent("KIND_SNAPSHOT_PART", sequence=5, tables=[{"network": LAN, "opened": sessions}])
    events, asked, _ = lied([part], [END])
    assert [type(e) for e in events[:3]] == [PeerConnected, PeerPart, PeerDisconnected]
    assert (asked[1].epoch, asked[1].sequence) == (0, 0)
    assert not asked[1].HasField("held")
    assert events[-3] == PeerPart(PEER, {LAN: dict.fromkeys((key(1), key(2)))})
    assert isinstance(events[-2], PeerSnapshot)


def _session(port: int) -> dict[str, Any]:
    flow = Flow.of(key(port))
    fields = {"client": int(flow.client), "remote": int(flow.remote), "protocol": flow.protocol}
    ports = {"client_port": flow.client_port, "remote_port": flow.remote_port}
    return {"flow": fields | ports, "nat_address": 1, "nat_port": port}


def test_what_piles_up_is_folded_into_few_messages() -> None:
    async def play(ap: PeerAp, subscriber: Subscriber) -> None:
        await subscriber.next(PeerConnected)
        await subscriber.next(PeerSnapshot)
        for port in range(1, 1001):
            ap.open(port)
        await subscriber.until(lambda: subscriber.feed.sequence == ap.log.sequence)
        assert subscriber.feed.deltas <= 4
        got = {k for e in subscriber.events if isinstance(e, PeerDelta) for k in e.tables[LAN]}
        assert got == ap.sessions.keys()

    scene(play)


def test_a_peer_that_is_not_there_is_tried_again_until_it_is() -> None:
    async def main() -> None:
        ap = PeerAp()
        await ap.start()
        await ap.stop()
        async with running(ap.port) as subscriber:
            async with asyncio.timeout(PATIENCE_S):
                while not subscriber.feed.reason:  # noqa: ASYNC110 - no event tells of it
                    await asyncio.sleep(0)
            assert subscriber.feed.state is PeerState.CONNECTING
            assert subscriber.events == []
            await ap.start()
            await subscriber.next(PeerConnected)
            await subscriber.next(PeerSnapshot)
        await ap.stop()

    asyncio.run(main())


def test_a_silent_partition_is_noticed() -> None:
    async def main() -> None:
        async with (
            started(PeerAp()) as ap,
            Wire(ap.port) as wire,
            running(wire.port) as subscriber,
        ):
            await subscriber.next(PeerConnected)
            await subscriber.next(PeerSnapshot)
            wire.cut()
            await subscriber.next(PeerDisconnected)
            assert subscriber.feed.state is PeerState.LOST

    asyncio.run(main())


def test_a_taken_port_is_named_with_its_key() -> None:
    async def main() -> None:
        async with started(PeerAp()) as ap:
            second = PeerFeedServer(PEER, ap.log, Endpoint(LOOPBACK, ap.port))
            with pytest.raises(NeedsError, match=rf"peering\.listen.*{LOOPBACK}:{ap.port}"):
                await second.start()
            await second.stop()

    asyncio.run(main())


# --- peers that misbehave


class Liar(peer_pb2_grpc.PeerFeedServicer):
    """Sends what it is told to, and remembers what it was asked."""

    def __init__(self, scripts: Iterable[list[pb.FeedMessage]], status: grpc.StatusCode) -> None:
        self.asked: list[pb.WatchRequest] = []
        self._scripts = iter(scripts)
        self._status = status

    async def Watch(  # noqa: N802 - the name in the proto file
        self, request: pb.WatchRequest, context: Any
    ) -> AsyncIterator[pb.FeedMessage]:
        self.asked.append(request)
        for message in next(self._scripts, []):
            yield message
        await context.abort(self._status, "enough")


def lied(
    *scripts: list[pb.FeedMessage], status: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE
) -> tuple[list[PeerEvent], list[pb.WatchRequest], str]:
    """Events, requests, and the first break's reason of a subscription to such a peer."""

    async def main() -> tuple[list[PeerEvent], list[pb.WatchRequest], str]:
        liar = Liar(scripts, status)
        server = grpc.aio.server()
        peer_pb2_grpc.add_PeerFeedServicer_to_server(liar, server)
        subscriber = Subscriber(server.add_insecure_port(f"{LOOPBACK}:0"))
        reasons: list[str] = []
        rounds = asyncio.Event()

        async def pause(_seconds: float) -> None:
            reasons.append(subscriber.feed.reason)
            if len(reasons) > len(scripts):
                rounds.set()
                await asyncio.Event().wait()

        subscriber.subscription._sleep = pause
        await server.start()
        task = asyncio.create_task(subscriber.subscription.run(), name="subscription under test")
        await asyncio.wait(
            {task, asyncio.create_task(rounds.wait())},
            timeout=PATIENCE_S,
            return_when=asyncio.FIRST_COMPLETED,
        )
        assert rounds.is_set(), task
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await server.stop(None)
        return subscriber.events, liar.asked, reasons[0]

    return asyncio.run(main())


def sent(kind: str, **fields: Any) -> pb.FeedMessage:
    header = {"ap": PEER, "protocol_version": versions.HIGHEST, "epoch": 1}
    return pb.FeedMessage(kind=kind, **{**header, **fields})


END = sent("KIND_SNAPSHOT_END", sequence=5)


def test_a_feed_of_another_ap_is_refused_whole() -> None:
    events, _, reason = lied([sent("KIND_SNAPSHOT_END", ap="ap9")])
    assert events == []
    assert "says it is 'ap9'" in reason


@pytest.mark.parametrize(
    "wrong",
    [
        sent("KIND_DELTA", follows=6, sequence=7),
        sent("KIND_DELTA", follows=5, sequence=4),
        sent("KIND_DELTA", follows=5, sequence=6, epoch=2),
        sent("KIND_UNSPECIFIED"),
    ],
)
def test_a_message_that_does_not_follow_costs_a_snapshot(wrong: pb.FeedMessage) -> None:
    events, asked, reason = lied([END, wrong])
    assert [type(e) for e in events] == [PeerConnected, PeerSnapshot, PeerDisconnected]
    assert reason.startswith("peer ap2: sent a")
    assert [(r.epoch, r.sequence) for r in asked] == [(0, 0), (0, 0)]


def test_a_delta_within_a_snapshot_is_a_fault() -> None:
    events, _, reason = lied(
        [sent("KIND_SNAPSHOT_PART", sequence=5), sent("KIND_DELTA", follows=0, sequence=1)]
    )
    assert [type(e) for e in events] == [PeerConnected, PeerDisconnected]
    assert "sent a delta" in reason


def test_half_a_snapshot_is_never_emitted() -> None:
    part = sent("KIND_SNAPSHOT_PART", sequence=5)
    events, asked, _ = lied([part], [END])
    kinds = [PeerConnected, PeerDisconnected, PeerConnected, PeerSnapshot, PeerDisconnected]
    assert [type(e) for e in events] == kinds
    assert (asked[1].epoch, asked[1].sequence) == (0, 0)
    assert (asked[2].epoch, asked[2].sequence) == (1, 5)


@pytest.mark.parametrize("status", [grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL])
def test_no_status_of_a_peer_ends_the_subscription(status: grpc.StatusCode) -> None:
    events, asked, reason = lied([END], [], status=status)
    assert len(asked) == 3
    assert reason == f"{status.name}: enough"
    assert isinstance(events[-1], PeerDisconnected)


def test_bytes_that_are_no_message_break_the_feed_and_no_more() -> None:
    async def noise(_request: bytes, _context: Any) -> AsyncIterator[bytes]:
        yield b"\xff\xff\xff\xff"
        await asyncio.Event().wait()

    async def main() -> None:
        server = grpc.aio.server()
        watch = grpc.unary_stream_rpc_method_handler(noise)
        handler = grpc.method_handlers_generic_handler("apagent.v1.PeerFeed", {"Watch": watch})
        server.add_generic_rpc_handlers((handler,))
        port = server.add_insecure_port(f"{LOOPBACK}:0")
        await server.start()
        try:
            async with running(port) as subscriber:
                async with asyncio.timeout(PATIENCE_S):
                    while not subscriber.feed.reason:  # noqa: ASYNC110 - it tells nobody
                        await asyncio.sleep(0.01)
                await subscriber.subscription.check()
                assert subscriber.feed.reason == "peer ap2: sent what is no feed message"
        finally:
            await server.stop(None)

    asyncio.run(main())


@asynccontextmanager
async def bounded(ap: PeerAp, max_sessions: int) -> AsyncIterator[Subscriber]:
    """A subscriber that holds so many of the peer's sessions, and no more."""
    async with started(ap), running(ap.port, Bounds(sessions=max_sessions)) as subscriber:
        await subscriber.until(lambda: subscriber.feed.snapshots == 1)
        yield subscriber


async def reconnected(ap: PeerAp, subscriber: Subscriber) -> None:
    """Break the feed, so that it has to begin with what differs."""
    feed, before = subscriber.feed, subscriber.feed.differences
    await ap.stop()
    await subscriber.until(lambda: feed.state is PeerState.LOST)
    ap.log = FeedLog(ap.log.epoch + 1, ap.contents)
    await ap.start()
    await subscriber.until(lambda: feed.differences > before)


@pytest.mark.parametrize("in_snapshot", [False, True])
def test_sessions_beyond_the_bound_are_refused_and_the_feed_goes_on(
    in_snapshot: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        ap = PeerAp()
        if in_snapshot:
            ap.open(1, 2, 3, 4, 5)
        async with bounded(ap, 3) as subscriber:
            if not in_snapshot:
                ap.open(1, 2, 3, 4)
                ap.open(5)
            await subscriber.until(lambda: subscriber.feed.refused == 2)
            ap.change({key(2): OTHER_NAT})
            ap.change({key(1): None, key(6): NAT, key(7): NAT})
            await subscriber.until(lambda: subscriber.feed.refused == 3)
            assert subscriber.sessions == {key(2): OTHER_NAT, key(3): NAT, key(6): NAT}
            assert subscriber.feed.in_sync
            assert not any(isinstance(event, PeerDisconnected) for event in subscriber.events)

    asyncio.run(main())
    (line,) = (r.getMessage() for r in caplog.records if "refused" in r.getMessage())
    assert "beyond the 3 that one AP may have" in line


def test_what_was_refused_is_no_reason_for_snapshot_after_snapshot() -> None:
    async def main() -> None:
        ap = PeerAp()
        ap.open(1, 2, 3, 4, 5)
        async with bounded(ap, 3) as subscriber:
            feed = subscriber.feed
            await reconnected(ap, subscriber)
            assert feed.refused > 2
            ap.change({key(1): stamped(NAT, 7)})
            await subscriber.until(lambda: feed.deltas == 1)
            assert (feed.snapshots, feed.differences, feed.in_sync) == (1, 1, True)
            assert len(subscriber.sessions) == 3

            ap.change({key(2): None, key(3): None})
            await subscriber.until(lambda: feed.deltas == 2)
            await reconnected(ap, subscriber)
            assert subscriber.sessions == ap.sessions
            ours, theirs = subscriber.tables[LAN].digest(PEER), ap.tables[LAN].digest(PEER)
            assert ours.total() == theirs.total()

    asyncio.run(main())


def test_what_a_snapshot_calls_closed_makes_no_room() -> None:
    tables = {LAN: SessionTables(ME, [PEER])}
    feed = Follower(PEER, [NETWORK], tables, Bounds(sessions=2))
    for port in range(1, 9):
        said = {"network": LAN, "opened": [_session(port)], "closed": [_session(1)["flow"]]}
        for event in feed.take_untrusted(sent("KIND_SNAPSHOT_PART", sequence=1, tables=[said])):
            take_in(tables, event)
    assert len(tables[LAN].table(PEER)) == 2
    assert feed.refused == 6


def claim_of(number: int, **fields: Any) -> dict[str, Any]:
    return {"network": LAN, "mac": bytes([2, 0, 0, 0, 0, number]), "generation": 1, **fields}


def test_claims_beyond_the_bound_are_refused_and_the_feed_goes_on() -> None:
    feed = Follower(PEER, [NETWORK], {LAN: SessionTables(ME, [PEER])}, Bounds(claims=2))
    sequence = 1

    def told(*claims: dict[str, Any], kind: str = "KIND_DELTA") -> set[int]:
        """The clients of which is told when the peer says these claims."""
        nonlocal sequence
        follows, sequence = feed.sequence, sequence + 1
        message = sent(kind, follows=follows, sequence=sequence, claims=claims)
        events = list(feed.take_untrusted(message))
        said = [event for event in events if isinstance(event, PeerDelta | PeerSnapshot)]
        return {int(claim.mac[-2:], 16) for event in said for claim in event.claims}

    assert told(kind="KIND_SNAPSHOT_END") == set()
    assert told(claim_of(1), claim_of(2), claim_of(3)) == {1, 2}
    assert told(claim_of(2, generation=2), claim_of(4)) == {2}
    assert feed.refused == 2
    assert told(claim_of(1, released=True), claim_of(5), claim_of(6)) == {1, 5}
    assert told(claim_of(5, withdrawn=True), claim_of(6)) == {5, 6}
    assert feed.refused == 3
    assert told(*map(claim_of, range(7, 11)), kind="KIND_SNAPSHOT_END") == {7, 8}
    assert feed.refused == 5
    assert told(claim_of(7, generation=3), claim_of(9)) == {7}
    assert feed.in_sync


def test_a_snapshot_that_breaks_off_makes_no_room_for_claims() -> None:
    feed = Follower(PEER, [NETWORK], {LAN: SessionTables(ME, [PEER])}, Bounds(claims=1))
    list(feed.take_untrusted(sent("KIND_SNAPSHOT_END", sequence=1, claims=[claim_of(1)])))
    list(feed.take_untrusted(sent("KIND_SNAPSHOT_PART", sequence=2)))
    feed.request(ME)
    delta = sent("KIND_DELTA", follows=1, sequence=2, claims=[claim_of(2)])
    (event,) = feed.take_untrusted(delta)
    assert isinstance(event, PeerDelta)
    assert event.claims == ()
    assert feed.refused == 1


def test_what_a_snapshot_ends_is_judged_when_all_before_it_is_taken_in() -> None:
    tables = {LAN: SessionTables(ME, [PEER])}
    feed = Follower(PEER, [NETWORK], tables)
    list(feed.take_untrusted(END))
    opened = [{"network": LAN, "opened": [_session(1)]}]
    told = list(feed.take_untrusted(sent("KIND_DELTA", follows=5, sequence=6, tables=opened)))
    snapshot = feed.take_untrusted(sent("KIND_SNAPSHOT_END", sequence=7))
    for event in [*told, next(snapshot)]:
        take_in(tables, event)
    assert set(tables[LAN].table(PEER)) == {key(1)}
    for event in snapshot:
        take_in(tables, event)
    assert set(tables[LAN].table(PEER)) == set()


def test_parts_of_different_snapshots_do_not_mix() -> None:
    parts = SnapshotParts(PEER, 1, 1, 1)
    with pytest.raises(PeerFault, match="at 2 of epoch 1 and at 1 of epoch 1"):
        parts.add_untrusted(1, 2, Statements({}, ()))


def test_waits_double_up_to_a_limit_and_start_again() -> None:
    backoff = Backoff(1.0, 5.0, jitter=lambda: 0.0)
    assert [backoff.next_s() for _ in range(4)] == [1.0, 2.0, 4.0, 5.0]
    backoff.reset()
    backoff.jitter = lambda: 1.0
    assert backoff.next_s() == 0.5


class Wire:
    """A TCP relay that can fall silent without closing anything."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._tasks: set[asyncio.Task[None]] = set()
        self._cut = False
        self.port = 0

    def cut(self) -> None:
        self._cut = True

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._relay, LOOPBACK, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(LOOPBACK, self._to)
        pairs = ((reader, far_writer), (far_reader, writer))
        pumps = {asyncio.create_task(self._pump(*pair), name="wire") for pair in pairs}
        self._tasks |= pumps
        await asyncio.wait(pumps)
        for end in (writer, far_writer):
            end.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                if not self._cut:
                    writer.write(data)


# --- whether it turns, for the watchdog


async def stuck(part: PeerSubscription | PeerFeedServer) -> str:
    """Why the part doesn't get ahead; empty: it does."""
    try:
        await part.check()
    except ApagentError as error:
        return str(error)
    return ""


def test_a_feed_that_runs_gets_ahead() -> None:
    async def play(_: PeerAp, subscriber: Subscriber) -> None:
        await subscriber.next(PeerConnected)
        await subscriber.next(PeerSnapshot)
        assert await stuck(subscriber.subscription) == ""

    scene(play)


def test_a_peer_that_is_down_is_no_reason_to_be_stuck() -> None:
    async def main() -> None:
        async with running(port=1) as subscriber:
            for _ in range(20):
                await asyncio.sleep(0.01)
                assert await stuck(subscriber.subscription) == ""

    asyncio.run(main())


def test_a_subscription_that_has_not_begun_or_has_ended_is_stuck() -> None:
    async def main() -> None:
        async with running(port=1) as subscriber:
            assert "has ended" in await stuck(subscriber.subscription)
            await asyncio.sleep(0.05)
            assert await stuck(subscriber.subscription) == ""
        assert "has ended" in await stuck(subscriber.subscription)

    asyncio.run(main())


def test_a_subscription_that_does_not_wake_up_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    async def oversleep(_: float) -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        monkeypatch.setattr(client, "OVERDUE_S", 0.0)
        async with running(port=1) as subscriber:
            subscriber.subscription._sleep = oversleep
            await asyncio.sleep(0.1)
            assert "wake up" in await stuck(subscriber.subscription)

    asyncio.run(main())


def test_a_subscription_that_does_not_notice_the_end_of_its_call_is_stuck(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def play(ap: PeerAp, subscriber: Subscriber) -> None:
        await subscriber.next(PeerConnected)
        await subscriber.next(PeerSnapshot)
        holds = asyncio.Event()

        async def hold(_: object) -> None:
            await holds.wait()

        monkeypatch.setattr(subscriber.subscription, "_tell", hold)
        monkeypatch.setattr(client, "OVERDUE_S", 0.0)
        ap.open(1)
        await asyncio.sleep(0.1)
        assert await stuck(subscriber.subscription) == ""
        await ap.stop()
        await asyncio.sleep(0.1)
        assert "end of its call" in await stuck(subscriber.subscription)
        holds.set()

    scene(play)


def test_a_server_serves_from_its_start_to_its_end() -> None:
    async def main() -> None:
        ap = PeerAp()
        server = PeerFeedServer(PEER, ap.log, Endpoint(LOOPBACK, 0), FAST)
        assert await stuck(server)
        await server.start()
        assert await stuck(server) == ""
        await server.stop()
        await asyncio.sleep(0.05)
        assert await stuck(server)

    asyncio.run(main())
