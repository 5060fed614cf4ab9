"""The serving side of the feed: each subscriber gets a snapshot where needed, then deltas.

Every message is an await, so that a large snapshot holds up nobody else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import grpc

from apagent.config import Endpoint
from apagent.core.feed import FeedLog
from apagent.core.model import ApId
from apagent.errors import ApagentError
from apagent.peers import versions
from apagent.peers.credentials import server_port
from apagent.peers.keepalive import KEEPALIVE, Keepalive
from apagent.peers.publisher import Publisher, SharedDeltas
from apagent.v1 import peer_pb2 as pb
from apagent.v1 import peer_pb2_grpc

MAX_SUBSCRIBERS = 256
"""Feeds served at a time: more than a mark mask of 8 bits has room for peers."""

_log = logging.getLogger(__name__)

_Context = grpc.aio.ServicerContext[pb.WatchRequest, pb.FeedMessage]


class _PeerFeed(peer_pb2_grpc.PeerFeedServicer):
    """Streams a `FeedLog`. A subscriber that reads slowly holds up nobody but itself."""

    def __init__(self, ap: ApId, log: FeedLog) -> None:
        self._deltas = SharedDeltas(ap)
        self._feed = log

    async def Watch(  # noqa: N802 - the name in the proto file
        self, request: pb.WatchRequest, context: _Context
    ) -> AsyncIterator[pb.FeedMessage]:
        version = versions.in_use(request.protocol_version)
        if version is None:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"this agent speaks {versions.ours()} of the feed, "
                f"not {request.protocol_version}: bring both to the same release",
            )
            raise AssertionError("abort returned")
        _log.info(
            "peer %.40r subscribes from %s, version %d",
            request.subscriber,
            context.peer(),
            version,
        )
        publisher = Publisher(self._deltas, self._feed, version, request)
        appended = asyncio.Event()
        unsubscribe = self._feed.subscribe(appended.set)
        try:
            while True:
                appended.clear()
                for message in publisher.news():
                    yield message
                await appended.wait()
        finally:
            unsubscribe()
            _log.info("the feed of peer %.40r ended", request.subscriber)


class PeerFeedServer:
    """Serves this AP's feed at an endpoint.

    Start it once the feed's contents are known: a peer believes what a snapshot leaves out to be
    gone.
    """

    def __init__(
        self, ap: ApId, log: FeedLog, endpoint: Endpoint, keepalive: Keepalive = KEEPALIVE
    ) -> None:
        self._endpoint = endpoint
        self._ended: asyncio.Task[bool] | None = None
        self._server = grpc.aio.server(
            options=keepalive.server_options, maximum_concurrent_rpcs=MAX_SUBSCRIBERS
        )
        peer_pb2_grpc.add_PeerFeedServicer_to_server(_PeerFeed(ap, log), self._server)

    async def start(self) -> int:
        """Listen; returns the port. Raises NeedsError where the endpoint can't be had."""
        port = server_port(self._server, self._endpoint)
        await self._server.start()
        self._ended = asyncio.create_task(self._server.wait_for_termination(), name="feed server")
        return port

    async def check(self) -> None:
        """Whether it still serves. Raises ApagentError."""
        if self._ended is None or self._ended.done():
            raise ApagentError("it doesn't serve")

    async def stop(self) -> None:
        """End every subscriber's stream and stop listening."""
        await self._server.stop(grace=None)
