"""The subscribing side of the feed: one peer's messages in, events for the engine out."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import cast

import grpc

from apagent.config import Endpoint
from apagent.core.domain import Network
from apagent.core.engine import PeerState
from apagent.core.events import PeerConnected, PeerDelta, PeerDisconnected, PeerSnapshot
from apagent.core.model import ApId
from apagent.errors import PeerFault
from apagent.peers.convert import PROTOCOL_VERSION, PeerReader, Statements
from apagent.peers.credentials import channel
from apagent.peers.keepalive import KEEPALIVE, Keepalive
from apagent.peers.snapshot import SnapshotParts
from apagent.v1 import peer_pb2 as pb
from apagent.v1 import peer_pb2_grpc

PeerEvent = PeerConnected | PeerSnapshot | PeerDelta | PeerDisconnected


@dataclass(slots=True)
class Backoff:
    """How long to wait before the next attempt: doubling up to a limit, a random part of it off.

    `jitter` draws from 0 to 1. Peers that lost the same AP at once come back spread out.
    """

    first_s: float = 0.2
    limit_s: float = 5.0
    jitter: Callable[[], float] = random.random
    _next_s: float = 0.0

    def reset(self) -> None:
        """The attempt succeeded."""
        self._next_s = 0.0

    def next_s(self) -> float:
        """Seconds to wait now."""
        self._next_s = min(self.limit_s, max(self.first_s, 2 * self._next_s))
        return self._next_s * (1 - self.jitter() / 2)


class PeerSubscription:
    """Follows the feed of one peer for as long as `run` runs.

    `emit` gets a PeerConnected when the peer has answered, then snapshots and deltas in the order
    of the feed, and a PeerDisconnected when it broke. After a break a new attempt goes on where the
    last one stopped; after a fault of the peer it starts from a snapshot.
    """

    def __init__(  # noqa: PLR0913 - the last three are there to be replaced in tests
        self,
        me: ApId,
        peer: ApId,
        endpoint: Endpoint,
        networks: Iterable[Network],
        emit: Callable[[PeerEvent], None],
        *,
        backoff: Backoff | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        keepalive: Keepalive = KEEPALIVE,
    ) -> None:
        self.peer = peer
        self.endpoint = endpoint
        self.state = PeerState.CONNECTING
        self.reason = ""
        """Why the feed broke last; empty while it runs."""
        self.epoch = 0
        self.sequence = 0
        """The position up to which the feed has been emitted."""
        self.snapshots = 0
        self.deltas = 0
        self._me = me
        self._reader = PeerReader(peer, networks)
        self._emit = emit
        self._backoff = backoff or Backoff()
        self._sleep = sleep
        self._keepalive = keepalive
        self._connected = False
        self._parts: SnapshotParts | None = None

    @property
    def refused(self) -> int:
        """Statements of this peer that were refused."""
        return self._reader.refused

    async def run(self) -> None:
        """Follow the feed until cancelled."""
        while True:
            try:
                await self._follow()
            except grpc.aio.AioRpcError as error:
                self._lose(_text(error))
            except PeerFault as fault:
                self._lose(str(fault))
                self.epoch = self.sequence = 0
            await self._sleep(self._backoff.next_s())

    async def _follow(self) -> None:
        """Subscribe once. Raises AioRpcError or PeerFault when the feed breaks."""
        self._parts = None
        request = pb.WatchRequest(
            subscriber=self._me,
            epoch=self.epoch,
            sequence=self.sequence,
            protocol_version=PROTOCOL_VERSION,
        )
        async with channel(self.endpoint, self._keepalive.channel_options) as peer:
            call = peer_pb2_grpc.PeerFeedStub(peer).Watch(request)
            try:
                async for message in cast(AsyncIterable[pb.FeedMessage], call):
                    self._take_untrusted(message)
            finally:
                call.cancel()
        raise PeerFault(f"peer {self.peer}: ended its feed without an error")

    def _take_untrusted(self, message: pb.FeedMessage) -> None:
        statements = self._reader.read_untrusted(message)
        if message.kind == pb.FeedMessage.KIND_DELTA:
            self._take_delta_untrusted(message, statements)
        elif message.kind in (pb.FeedMessage.KIND_SNAPSHOT_PART, pb.FeedMessage.KIND_SNAPSHOT_END):
            self._take_snapshot_untrusted(message, statements)
        else:
            raise PeerFault(f"peer {self.peer}: sent a message of unknown kind {message.kind}")

    def _take_delta_untrusted(self, message: pb.FeedMessage, statements: Statements) -> None:
        position = (message.epoch, message.follows)
        if (
            self._parts is not None
            or position != (self.epoch, self.sequence)
            or message.sequence < message.follows
        ):
            raise PeerFault(
                f"peer {self.peer}: sent a delta from {message.follows} to {message.sequence} "
                f"of epoch {message.epoch}, expected one from {self.sequence} of {self.epoch}"
            )
        self._connect()
        self.deltas += 1
        self._reach(message)
        self._emit(PeerDelta(self.peer, message.clock, *statements))

    def _take_snapshot_untrusted(self, message: pb.FeedMessage, statements: Statements) -> None:
        self._connect()
        if self._parts is None:
            self.state = PeerState.SYNCING
            self._parts = SnapshotParts(self.peer, message.epoch, message.sequence)
        self._parts.add_untrusted(message.epoch, message.sequence, statements)
        if message.kind != pb.FeedMessage.KIND_SNAPSHOT_END:
            return
        parts, self._parts = self._parts, None
        self.snapshots += 1
        self._reach(message)
        claims = tuple(parts.claims)
        self._emit(PeerSnapshot(self.peer, message.clock, parts.tables, claims, statements.anchor))

    def _connect(self) -> None:
        if not self._connected:
            self._connected = True
            self.state, self.reason = PeerState.SYNCING, ""
            self._emit(PeerConnected(self.peer))

    def _reach(self, message: pb.FeedMessage) -> None:
        self.epoch, self.sequence = message.epoch, message.sequence
        self.state = PeerState.IN_SYNC
        self._backoff.reset()

    def _lose(self, reason: str) -> None:
        self.reason = reason
        if self._connected:
            self._connected = False
            self.state = PeerState.LOST
            self._emit(PeerDisconnected(self.peer, reason))


def _text(error: grpc.aio.AioRpcError) -> str:
    return f"{error.code().name}: {error.details() or 'no details'}"
