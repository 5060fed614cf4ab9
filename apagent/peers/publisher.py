"""What one subscriber to our feed is sent: messages from its position on. No I/O."""

from __future__ import annotations

from collections.abc import Iterator

from apagent.core.feed import FeedDelta, FeedLog
from apagent.core.model import ApId
from apagent.peers import versions
from apagent.peers.convert import delta_message, held_untrusted, snapshot_messages
from apagent.v1 import peer_pb2 as pb


class SharedDeltas:
    """The message of the latest delta: all subscribers that keep up are sent the same one."""

    def __init__(self, ap: ApId) -> None:
        self.ap = ap
        self._delta: FeedDelta | None = None
        self._by_version: dict[int, pb.FeedMessage] = {}

    def message(self, version: int, epoch: int, delta: FeedDelta) -> pb.FeedMessage:
        """`delta` of the feed's run `epoch` as a message of `version`."""
        if delta is not self._delta:
            self._delta, self._by_version = delta, {}
        if version not in self._by_version:
            self._by_version[version] = delta_message(self.ap, version, epoch, delta)
        return self._by_version[version]


class Publisher:
    """A subscriber's position in a feed, from its request on, in the version in use."""

    def __init__(
        self, deltas: SharedDeltas, feed: FeedLog, version: int, request: pb.WatchRequest
    ) -> None:
        self._deltas = deltas
        self._feed = feed
        self._version = version
        self._epoch = request.epoch
        self._sequence = request.sequence
        may_differ = version >= versions.WITH_DIFFERENCES
        self._held = held_untrusted(request) if may_differ else None
        self._answered = False

    def news(self) -> Iterator[pb.FeedMessage]:
        """What leads from the position to the feed's end; at first one message at least.

        Each is made when its turn comes, in a millisecond or two: let others run in between.
        """
        while not self._answered or self._sequence != self._feed.sequence:
            self._answered = True
            delta = self._feed.since(self._epoch, self._sequence)
            if delta is None:
                yield from self._snapshot()
            else:
                # From here on the subscriber holds more than its request said.
                self._sequence, self._held = delta.sequence, None
                yield self._deltas.message(self._version, self._epoch, delta)

    def _snapshot(self) -> Iterator[pb.FeedMessage]:
        snapshot = self._feed.snapshot(self._epoch, self._held)
        self._epoch, self._sequence, self._held = self._feed.epoch, snapshot.sequence, None
        yield from snapshot_messages(self._deltas.ap, self._version, self._epoch, snapshot)
