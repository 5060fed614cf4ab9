"""What this AP tells its peers: a bounded log of changes to tables that live elsewhere.

The log keeps the latest changes only. A subscriber holds nothing here but its position: `since`
gives it the next delta, with everything that piled up in between folded together, for as long as
the log reaches back to it. After that it takes a snapshot, without what it can show by digests to
hold already. So a slow subscriber costs nothing, and the feed needs a fixed amount of memory
however many there are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from apagent.core.digest import Buckets, FeedDigest, TableDigest, feed_digest
from apagent.core.model import (
    AnchorStatement,
    Claim,
    FlowKey,
    Nat,
    NetworkName,
    SessionChanges,
    Sessions,
)

CAPACITY = 65536
"""Changes that a feed remembers."""
MAX_CHANGES = 512
"""Changes in one delta at most: about 15 kB on the wire, and a millisecond to apply."""
MAX_LOOKED_AT = 8192
"""Sessions that are searched for those of some buckets before others may run: a millisecond."""


class FeedContents(NamedTuple):
    """Everything that the feed says at one moment. `clock` is the highest claim generation seen.

    Where nobody keeps `digests` of the tables, every snapshot is a whole one.
    """

    tables: Mapping[NetworkName, Sessions]
    claims: Sequence[Claim]
    clock: int
    anchor: AnchorStatement = AnchorStatement()
    digests: Mapping[NetworkName, TableDigest] | None = None


@dataclass(frozen=True, slots=True)
class FeedDelta:
    """What leads from the position `follows` to the position `sequence` (they may be the same)."""

    follows: int
    sequence: int
    clock: int
    tables: Mapping[NetworkName, SessionChanges] = field(default_factory=dict)
    claims: tuple[Claim, ...] = ()
    anchor: AnchorStatement | None = None
    """None: as before."""


@dataclass(frozen=True, slots=True)
class FeedSnapshot:
    """Everything that the feed says at the position `sequence`.

    Of the sessions, `pieces` gives those that the subscriber needs: all, or those in the buckets
    that `differing` names.
    """

    sequence: int
    contents: FeedContents
    differing: Buckets | None = None

    def pieces(self) -> Iterator[tuple[NetworkName, Sessions]]:
        """The sessions, at most `MAX_CHANGES` at a time; a piece may be empty."""
        if self.differing is not None and not self.differing.numbers:
            return
        for network, sessions in self.contents.tables.items():
            items = iter(sessions.items())
            if self.differing is None:
                while whole := dict(islice(items, MAX_CHANGES)):
                    yield network, whole
                continue
            while looked_at := dict(islice(items, MAX_LOOKED_AT)):
                yield from _pieces(network, looked_at, self.differing)


class _Piece(NamedTuple):
    """What one position adds."""

    tables: Mapping[NetworkName, SessionChanges]
    claims: Sequence[Claim]
    anchor: AnchorStatement | None

    @property
    def size(self) -> int:
        return sum(map(len, self.tables.values())) + len(self.claims) + (self.anchor is not None)


class FeedLog:
    """The feed of one run of the agent, which `epoch` names.

    `snapshot` gives the contents at the current position: whoever changes the tables calls `append`
    before anybody else can run. It may hand out live tables, `FeedLog` copies them.
    Not safe for threads.
    """

    def __init__(
        self, epoch: int, snapshot: Callable[[], FeedContents], capacity: int = CAPACITY
    ) -> None:
        self.epoch = epoch
        self.sequence = 0
        self._clock = 0
        self._contents = snapshot
        self._capacity = capacity
        self._pieces: deque[_Piece] = deque()
        self._size = 0
        self._latest = FeedDelta(-1, -1, 0)
        self._listeners: dict[object, Callable[[], None]] = {}

    def append(
        self,
        tables: Mapping[NetworkName, SessionChanges],
        claims: Sequence[Claim],
        clock: int,
        anchor: AnchorStatement | None = None,
    ) -> None:
        """Publish one batch.

        A batch of more than `MAX_CHANGES` takes several positions. A new clock alone is not worth
        a message: it travels with the next one. The statement comes last: who reads it has the
        sessions that it speaks of.
        """
        self._clock = max(self._clock, clock)
        before = self.sequence
        for piece in _pieces_of(tables, claims, anchor):
            self._pieces.append(piece)
            self._size += piece.size
            self.sequence += 1
        self._forget_oldest()
        if self.sequence != before:
            for notify in tuple(self._listeners.values()):
                notify()

    def subscribe(self, notify: Callable[[], None]) -> Callable[[], None]:
        """Have `notify` called after each batch; returns what ends that."""
        token = object()
        self._listeners[token] = notify

        def unsubscribe() -> None:
            self._listeners.pop(token, None)

        return unsubscribe

    def since(self, epoch: int, sequence: int) -> FeedDelta | None:
        """The next delta for a subscriber at this position; None: it needs a snapshot.

        It holds at most `MAX_CHANGES`, so a subscriber far behind calls again. It is empty where
        there is nothing new.
        """
        oldest = self.sequence - len(self._pieces)
        if epoch != self.epoch or not oldest <= sequence <= self.sequence:
            return None
        if (self._latest.follows, self._latest.sequence) != (sequence, self.sequence):
            self._latest = self._delta(sequence, oldest)
        return self._latest

    def _delta(self, sequence: int, oldest: int) -> FeedDelta:
        """What follows `sequence`. Subscribers that keep up all ask for the same."""
        first = sequence - oldest
        # A deque finds what is near its ends at once.
        pieces = _that_fit(self._pieces[index] for index in range(first, len(self._pieces)))
        tables, claims, anchor = _fold(pieces)
        return FeedDelta(sequence, sequence + len(pieces), self._clock, tables, claims, anchor)

    def snapshot(self, epoch: int = 0, held: FeedDigest | None = None) -> FeedSnapshot:
        """All contents now, in a copy that later changes don't touch.

        Sessions that the subscriber has are left out, if there is a digest of what it `held` at a
        position in `epoch`. If that is another run's, it takes the generations of what is left out
        for 0: that is what a new run says of all sessions that it finds.
        """
        tables, claims, clock, anchor, digests = self._contents()
        copies = {network: dict(sessions) for network, sessions in tables.items()}
        self._clock = max(self._clock, clock)
        contents = FeedContents(copies, tuple(claims), self._clock, anchor)
        if held is None or digests is None:
            return FeedSnapshot(self.sequence, contents)
        ours = feed_digest(digests, len(held.sessions))
        differing = ours.differing(held, restarted=epoch != self.epoch)
        return FeedSnapshot(self.sequence, contents, differing)

    def _forget_oldest(self) -> None:
        while self._size > self._capacity:
            self._size -= self._pieces.popleft().size


def _pieces_of(
    tables: Mapping[NetworkName, SessionChanges],
    claims: Sequence[Claim],
    anchor: AnchorStatement | None,
) -> Iterator[_Piece]:
    """A batch, in pieces of at most `MAX_CHANGES`; usually it is one as it stands."""
    whole = _Piece(tables, claims, anchor)
    if whole.size <= MAX_CHANGES:
        if whole.size:
            yield whole
        return
    for network, changes in tables.items():
        items = iter(changes.items())
        while some := dict(islice(items, MAX_CHANGES)):
            yield _Piece({network: some}, (), None)
    for first in range(0, len(claims), MAX_CHANGES):
        yield _Piece({}, claims[first : first + MAX_CHANGES], None)
    if anchor is not None:
        yield _Piece({}, (), anchor)


def _pieces(
    network: NetworkName, sessions: Sessions, wanted: Buckets
) -> Iterator[tuple[NetworkName, Sessions]]:
    found = iter([(key, sessions[key]) for key in wanted.of(sessions)])
    yield network, dict(islice(found, MAX_CHANGES))
    while more := dict(islice(found, MAX_CHANGES)):
        yield network, more


def _that_fit(pieces: Iterable[_Piece]) -> list[_Piece]:
    fit, size = [], 0
    for piece in pieces:
        size += piece.size
        if size > MAX_CHANGES:
            break
        fit.append(piece)
    return fit


def _fold(
    pieces: Sequence[_Piece],
) -> tuple[Mapping[NetworkName, SessionChanges], tuple[Claim, ...], AnchorStatement | None]:
    """Keep the last word on every session and client, and on the anchor."""
    if len(pieces) == 1:
        [only] = pieces
        return only.tables, _last_words(only.claims), only.anchor
    tables: dict[NetworkName, dict[FlowKey, Nat | None]] = {}
    anchor: AnchorStatement | None = None
    for piece in pieces:
        for network, changes in piece.tables.items():
            tables.setdefault(network, {}).update(changes)
        anchor = piece.anchor or anchor
    return tables, _last_words(claim for piece in pieces for claim in piece.claims), anchor


def _last_words(claims: Iterable[Claim]) -> tuple[Claim, ...]:
    return tuple({(claim.network, claim.mac): claim for claim in claims}.values())
