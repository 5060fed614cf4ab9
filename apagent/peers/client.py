"""The subscribing side of the feed: connects to one peer, again and again, and follows it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import cast

import grpc

from apagent.config import Endpoint
from apagent.core.events import PeerPart
from apagent.core.model import ApId
from apagent.errors import ApagentError, PeerFault
from apagent.peers.credentials import channel
from apagent.peers.follower import Follower, PeerEvent
from apagent.peers.keepalive import KEEPALIVE, Keepalive
from apagent.v1 import peer_pb2 as pb
from apagent.v1 import peer_pb2_grpc

OVERDUE_S = 5.0
"""How late a pause may end on a busy machine."""


@dataclass(slots=True)
class Backoff:
    """How long to wait before the next attempt: doubling up to a limit, a random part of it off.

    `jitter` draws from 0 to 1. Peers that lost the same AP at once come back spread out. The limit
    is what a healed partition may cost: an attempt that nobody answers is a packet or two.
    """

    first_s: float = 0.2
    limit_s: float = 1.0
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

    `emit` gets a PeerConnected when the peer has answered, then what its `follower` makes of the
    feed, in order, and a PeerDisconnected when it broke. After a break a new attempt goes on where
    the last one stopped; after a fault of the peer it starts from a snapshot.
    """

    def __init__(
        self,
        me: ApId,
        endpoint: Endpoint,
        follower: Follower,
        emit: Callable[[PeerEvent], None],
        *,
        backoff: Backoff | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        keepalive: Keepalive = KEEPALIVE,
    ) -> None:
        self.endpoint = endpoint
        self.follower = follower
        self._me = me
        self._emit = emit
        self._backoff = backoff or Backoff()
        self._sleep = sleep
        self._keepalive = keepalive
        self._running = False
        self._due_s: float | None = None
        """By when (the loop's clock) `run` has to do its next step; None: the peer has to."""

    async def check(self) -> None:
        """Whether `run` gets ahead. Raises ApagentError; a peer that is down is no reason to.

        What can be seen from outside: a pause is followed by a call, and the end of a call by a
        pause.
        """
        if not self._running:
            raise ApagentError("it has ended")
        if self._due_s is not None and _now_s() > self._due_s + OVERDUE_S:
            raise ApagentError("it doesn't wake up after a pause or at the end of its call")

    async def run(self) -> None:
        """Follow the feed until cancelled."""
        self._running = True
        try:
            await self._run()
        finally:
            self._running = False

    async def _run(self) -> None:
        while True:
            try:
                await self._follow()
            except grpc.aio.AioRpcError as error:
                await self._tell(self.follower.lose(_text(error)))
            except PeerFault as fault:
                await self._tell(self.follower.lose(str(fault)))
                self.follower.start_over()
            pause_s = self._backoff.next_s()
            self._due_s = _now_s() + pause_s
            await self._sleep(pause_s)

    async def _follow(self) -> None:
        """Subscribe once. Raises AioRpcError or PeerFault when the feed breaks."""
        async with channel(self.endpoint, self._keepalive.channel_options) as peer:
            call = peer_pb2_grpc.PeerFeedStub(peer).Watch(self.follower.request(self._me))
            self._due_s = None
            call.add_done_callback(self._wake)
            try:
                async for message in cast(AsyncIterable[pb.FeedMessage | None], call):
                    if message is None:  # what gRPC makes of bytes that are no such message
                        raise PeerFault(f"peer {self.follower.peer}: sent what is no feed message")
                    await self._tell(self.follower.take_untrusted(message))
                    if self.follower.in_sync:
                        self._backoff.reset()
            finally:
                self._wake()
                call.cancel()
        raise PeerFault(f"peer {self.follower.peer}: ended its feed without an error")

    def _wake(self, _call: object = None) -> None:
        """The call is at its end."""
        self._due_s = _now_s()

    async def _tell(self, events: Iterable[PeerEvent]) -> None:
        """Emit the events; those of a snapshot's parts let others run in between."""
        for event in events:
            self._emit(event)
            if isinstance(event, PeerPart):
                await asyncio.sleep(0)


def _now_s() -> float:
    return asyncio.get_running_loop().time()


def _text(error: grpc.aio.AioRpcError) -> str:
    return f"{error.code().name}: {error.details() or 'no details'}"
