"""The feeds between agents: what a subscriber may see of a `FeedLog`, without a wire.

Messages of one stream come in order and none is missing, until it breaks; then what was under way
is lost. A new one goes on at the subscriber's position. Both ends are the agent's own (`Publisher`,
`Follower`); what the latter calls a fault of its peer, or refuses, is a violation here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING
from unittest.mock import patch

from apagent.core.events import Event, PeerPart
from apagent.errors import PeerFault
from apagent.peers.follower import Follower, PeerEvent
from apagent.peers.publisher import Publisher
from apagent.v1 import peer_pb2 as pb
from tests.simulation.scenario import Violation

if TYPE_CHECKING:
    from tests.simulation.node import Agent, Node

WINDOW = 3
"""Messages under way at most: beyond that the server waits for the subscriber."""
SMALL = {
    "apagent.core.feed.MAX_CHANGES": 4,
    "apagent.core.feed.MAX_LOOKED_AT": 5,
    "apagent.peers.convert.MAX_CHANGES": 4,
    "apagent.peers.snapshot.MAX_CHANGES": 3,
}


@contextmanager
def small_pieces() -> Iterator[None]:
    """Make messages so small that a few flows fill many."""
    with ExitStack() as stack:
        for name, size in SMALL.items():
            stack.enter_context(patch(name, size))
        yield


class Stream:
    """The serving end: one subscriber's stream."""

    def __init__(self, agent: Agent, request: pb.WatchRequest) -> None:
        self.dead = False
        """The server is gone; what is under way may still arrive."""
        self._publisher = Publisher(agent.deltas, agent.feed, request.protocol_version, request)
        self._news = self._publisher.news()
        self._pipe: deque[pb.FeedMessage] = deque()

    def fill(self) -> bool:
        """Let the server send; whether something is under way."""
        while not self.dead and len(self._pipe) < WINDOW:
            message = next(self._news, None)
            if message is None:
                self._news = self._publisher.news()
                message = next(self._news, None)
            if message is None:
                break
            self._pipe.append(message)
        return bool(self._pipe)

    def drop(self) -> None:
        """What is under way is lost."""
        self._pipe.clear()

    def receive(self) -> pb.FeedMessage:
        """The next message; `fill` says whether there is one."""
        return self._pipe.popleft()


class Subscription:
    """The subscribing end: `reader` follows the feed of `writer`."""

    def __init__(self, reader: Node, writer: Node) -> None:
        self.reader, self.writer = reader, writer
        self.cut = False
        """The reader can't reach the writer's server."""
        self.stalled = False
        """Nothing arrives, and nobody notices."""
        self.forget()

    def forget(self) -> None:
        """The reader's agent is gone, and with it what it knew."""
        self.stream: Stream | None = None
        self._follower: Follower | None = None
        self._told: Iterator[PeerEvent] = iter(())
        self._telling = False
        """A message is being worked off."""

    @property
    def follower(self) -> Follower:
        """The position of the reader's agent, which must be running."""
        if self._follower is None:
            engine = self.reader.engine
            self._follower = Follower(self.writer.id, engine.domain.networks, engine.sessions)
        return self._follower

    @property
    def ready(self) -> bool:
        """Whether `pull` would do something."""
        if self.reader.agent is None or self.stalled:
            return False
        if self._telling:
            return True
        if self.stream is None:
            return self.writer.agent is not None and not self.cut
        return self.cut or self.stream.fill() or self.stream.dead

    def pull(self, messages: int) -> list[Event]:
        """Connect, take up to so many messages, or notice a break.

        A part of a snapshot comes by itself: others run before the next one.
        """
        events: list[Event] = []
        if self._telling:
            self._take(events)
            return events
        if self.stream is None:
            assert self.writer.agent is not None
            self.stream = Stream(self.writer.agent, self.follower.request(self.reader.id))
            return []
        if self.cut or not self.stream.fill():
            return self.lose()
        while messages and self.stream.fill():
            messages -= 1
            self._told = self.follower.take_untrusted(self.stream.receive())
            if self._take(events):
                break
        return events

    def lose(self) -> list[Event]:
        """The stream breaks, once the message that was being worked off has been."""
        events: list[Event] = list(self._told)
        self.stream, self._telling = None, False
        return events + list(self.follower.lose("broken"))

    def _take(self, events: list[Event]) -> bool:
        """Take what the message tells; whether it isn't over because others come first."""
        try:
            for event in self._told:
                events.append(event)
                self._telling = isinstance(event, PeerPart)
                if self._telling:
                    return True
        except PeerFault as fault:
            raise Violation(f"{self.reader.id}: {fault}") from fault
        self._telling = False
        if self.follower.refused:
            raise Violation(f"{self.reader.id} refused what {self.writer.id} said")
        return False

    def check(self) -> None:
        """Where the reader has all of the feed, it believes what the writer says. Or Violation."""
        reader, writer = self.reader.agent, self.writer.agent
        if reader is None or writer is None or self.stream is None:
            return
        position = self.follower.epoch, self.follower.sequence
        if not self.follower.in_sync or position != (writer.feed.epoch, writer.feed.sequence):
            return
        who, what = self.reader.id, f"all of {self.writer.id}'s feed"
        for name, tables in reader.engine.sessions.items():
            if tables.table(self.writer.id) != writer.engine.sessions[name].table(self.writer.id):
                raise Violation(f"{who} has {what}, but another table")
            said = reader.engine.clients[name]._said.values()
            heard = {c.mac: c for each in said if (c := each.get(self.writer.id)) is not None}
            if heard != {c.mac: c for c in writer.engine.clients[name].own_claims()}:
                raise Violation(f"{who} has {what}, but other claims: {heard}")
