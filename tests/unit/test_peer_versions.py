"""Agents of different versions: each speaks the highest that both know, and nothing else breaks."""

from __future__ import annotations

import asyncio
from ipaddress import IPv4Address

import grpc
import pytest

from apagent.config import Endpoint
from apagent.core.events import PeerConnected, PeerDelta, PeerPart, PeerSnapshot
from apagent.core.feed import FeedContents, FeedDelta, FeedLog, FeedSnapshot
from apagent.core.model import AnchorMode, AnchorStatement, Flow, NetworkAnchor
from apagent.core.session_tables import SessionTables
from apagent.peers import versions
from apagent.peers.convert import delta_message, held_untrusted, snapshot_messages
from apagent.peers.follower import Follower, PeerEvent
from apagent.peers.publisher import Publisher, SharedDeltas
from apagent.peers.server import PeerFeedServer
from apagent.v1 import peer_pb2 as pb
from apagent.v1 import peer_pb2_grpc
from tests.domains import AP1, AP2, LAN, OTHER_NAT, at, claim, lan, tcp, udp

ECHO = Flow(1, IPv4Address("10.77.1.1"), 7, IPv4Address("198.51.100.10"), 0).key
ANCHOR = AnchorStatement((NetworkAnchor(LAN, AnchorMode.DRAINING),))

# What agents of version 1 send, byte for byte.
REQUEST_1 = bytes.fromhex("0a03617031100918032001")
DELTA_1 = bytes.fromhex(
    "08011009180420062a360a036c616e121d0a100d01014d0a150a6433c6180620012850150c7100cb18c0b8022005"
    "1a100d01014d0a150a6433c618112002283532150a036c616e120602000000000a1805220401014d0a3a03617032"
    "40014803"
)
SNAPSHOT_1 = [
    bytes.fromhex(
        "08021009180320052a410a036c616e121d0a100d01014d0a150a6433c6180620012850150c7100cb18c0b802"
        "2005121b0a0e0d01014d0a150a6433c618012007150c7100cb18c0b80220053a036170324001"
    ),
    bytes.fromhex("080210091803200532150a036c616e120602000000000a1805220401014d0a3a036170324001"),
    bytes.fromhex("08031009180320053a036170324001"),
]
NAT_1 = at(5, OTHER_NAT)
TABLE_1 = {tcp(1): NAT_1, ECHO: NAT_1}


def follower() -> Follower:
    return Follower(AP2, [lan()], {LAN: SessionTables(AP1, [AP2])})


def taken(feed: Follower, *messages: bytes) -> list[PeerEvent]:
    return [
        event
        for message in messages
        for event in feed.take_untrusted(pb.FeedMessage.FromString(message))
    ]


def feed_log() -> FeedLog:
    digests = {LAN: SessionTables(AP2, []).digest(AP2)}
    return FeedLog(9, lambda: FeedContents({LAN: {}}, [], 5, ANCHOR, digests))


def test_what_an_agent_of_version_1_sends_is_understood() -> None:
    feed = follower()
    _, part, snapshot = taken(feed, *SNAPSHOT_1)
    assert part == PeerPart(AP2, {LAN: TABLE_1})
    assert snapshot == PeerSnapshot(AP2, 5, None, (claim(AP2, 5),))
    assert taken(feed, DELTA_1) == [
        PeerDelta(AP2, 6, {LAN: {tcp(1): NAT_1, udp(2): None}}, (claim(AP2, 5),))
    ]
    assert feed.version == 1


def test_an_agent_of_version_1_is_sent_what_it_knows_and_nothing_else() -> None:
    contents = FeedContents({LAN: TABLE_1}, [claim(AP2, 5)], 5, ANCHOR)
    messages = snapshot_messages(AP2, 1, 9, FeedSnapshot(3, contents))
    assert [message.SerializeToString() for message in messages] == SNAPSHOT_1
    tables = {LAN: {tcp(1): NAT_1, udp(2): None}}
    delta = FeedDelta(3, 4, 6, tables, (claim(AP2, 5),), ANCHOR)
    assert delta_message(AP2, 1, 9, delta).SerializeToString() == DELTA_1


def test_an_agent_of_version_1_gets_whole_snapshots() -> None:
    request = pb.WatchRequest.FromString(REQUEST_1)
    version = versions.in_use(request.protocol_version)
    assert version == 1
    request.held.CopyFrom(pb.Digest(sessions=[0], generations=[0]))
    [message] = Publisher(SharedDeltas(AP2), feed_log(), version, request).news()
    assert message.kind == pb.FeedMessage.KIND_SNAPSHOT_END
    assert message.protocol_version == 1


def test_agents_of_the_same_version_use_it() -> None:
    feed = follower()
    [first] = Publisher(SharedDeltas(AP2), feed_log(), 2, feed.request(AP1)).news()
    assert taken(feed, first.SerializeToString())[-1] == PeerSnapshot(AP2, 5, None, anchor=ANCHOR)
    assert feed.version == 2
    feed.epoch = 8
    [second] = Publisher(SharedDeltas(AP2), feed_log(), 2, feed.request(AP1)).news()
    assert second.kind == pb.FeedMessage.KIND_DIFFERENCE_END


@pytest.mark.parametrize(("theirs", "in_use"), [(0, None), (1, 1), (2, 2), (3, 2), (2**32 - 1, 2)])
def test_the_highest_version_that_both_know_is_used(theirs: int, in_use: int | None) -> None:
    assert versions.in_use(theirs) == in_use


def test_a_subscriber_below_our_lowest_version_is_told_so() -> None:
    async def main() -> str:
        server = PeerFeedServer(AP2, feed_log(), Endpoint("127.0.0.1", 0))
        port = await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            request = pb.WatchRequest(subscriber=AP1)
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await peer_pb2_grpc.PeerFeedStub(channel).Watch(request).read()
        await server.stop()
        assert refusal.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        return str(refusal.value.details())

    assert asyncio.run(main()) == (
        "this agent speaks versions 1 to 2 of the feed, not 0: bring both to the same release"
    )


# --- from a later version

_VARINT, _BYTES = 0, 2


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _number(number << 3 | _VARINT) + _number(value)
    return _number(number << 3 | _BYTES) + _number(len(value)) + value


def _number(value: int) -> bytes:
    """A varint (https://protobuf.dev/programming-guides/encoding/)."""
    groups = [value >> shift & 0x7F for shift in range(0, max(1, value.bit_length()), 7)]
    return bytes(group | 0x80 for group in groups[:-1]) + bytes(groups[-1:])


def test_fields_that_we_do_not_know_do_no_harm() -> None:
    news = _field(777, b"news") + _field(778, 1 << 60)
    changed = pb.FeedMessage.FromString(DELTA_1)
    session = changed.tables[0].opened[0].SerializeToString() + news
    table = _field(1, b"lan") + _field(2, session) + _field(9, b"more")
    claims = _field(6, changed.claims[0].SerializeToString() + news)
    head = _field(1, 1) + _field(2, 9) + _field(9, 3) + _field(3, 4) + _field(4, 6)
    delta = head + _field(7, b"ap2") + _field(8, 2) + _field(5, table) + claims + news
    feed = follower()
    taken(feed, *SNAPSHOT_1)
    expected = PeerDelta(AP2, 6, {LAN: {tcp(1): NAT_1}}, (claim(AP2, 5),))
    assert taken(feed, delta) == [expected]


def test_a_mode_that_we_do_not_know_counts_as_active() -> None:
    network = _field(1, b"lan") + _field(2, 99)
    end = SNAPSHOT_1[-1] + _field(10, _field(1, network) + _field(44, 1))
    *_, snapshot = taken(follower(), end)
    assert isinstance(snapshot, PeerSnapshot)
    assert snapshot.anchor == AnchorStatement((NetworkAnchor(LAN, AnchorMode.ACTIVE),))


def test_messages_of_a_kind_that_we_do_not_know_are_passed_over() -> None:
    later = _field(1, 99) + _field(2, 9) + _field(7, b"ap2") + _field(8, 2) + _field(12, b"x")
    feed = follower()
    events = taken(feed, later, *SNAPSHOT_1[:-1], later, SNAPSHOT_1[-1], later, DELTA_1, later)
    assert isinstance(events[0], PeerConnected)
    assert isinstance(events[-1], PeerDelta)
    assert (feed.epoch, feed.sequence) == (9, 4)


def test_requests_with_more_than_we_know_are_answered() -> None:
    digest = _field(1, bytes(8)) + _field(2, bytes(8)) + _field(7, b"more")
    request = pb.WatchRequest.FromString(
        _field(1, b"ap1") + _field(2, 8) + _field(4, 9) + _field(5, digest) + _field(99, b"more")
    )
    version = versions.in_use(request.protocol_version)
    assert version == 2
    [message] = Publisher(SharedDeltas(AP2), feed_log(), version, request).news()
    assert (message.kind, message.protocol_version) == (pb.FeedMessage.KIND_DIFFERENCE_END, 2)


@pytest.mark.parametrize(
    ("sessions", "generations"),
    [(0, 0), (3, 3), (2, 1), (1, 2), (0, 1), (8192, 8192)],
)
def test_digests_that_no_agent_would_send_count_for_nothing(
    sessions: int, generations: int
) -> None:
    held = pb.Digest(sessions=[0] * sessions, generations=[0] * generations)
    request = pb.WatchRequest(epoch=8, protocol_version=2, held=held)
    assert held_untrusted(request) is None
    [message] = Publisher(SharedDeltas(AP2), feed_log(), 2, request).news()
    assert message.kind == pb.FeedMessage.KIND_SNAPSHOT_END
