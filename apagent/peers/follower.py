"""What the feed of one peer means: its messages in, events for the engine out. No I/O.

A snapshot's sessions hold as soon as they are heard, part by part, so that neither a large one nor
what it changes holds up anybody else for long. What the peer doesn't say any more goes at its end.
A snapshot that breaks off has told nothing wrong; the position stays what it was, and the next
attempt starts from what is held by then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from apagent.core.digest import Buckets, bucket_count, feed_digest
from apagent.core.domain import Network
from apagent.core.engine import PeerState
from apagent.core.events import PeerConnected, PeerDelta, PeerDisconnected, PeerPart, PeerSnapshot
from apagent.core.model import ApId, Claim, FlowKey, NetworkName
from apagent.core.session_tables import SessionTables
from apagent.errors import PeerFault
from apagent.peers import versions
from apagent.peers.convert import PeerReader, Statements, Tables, digest_message
from apagent.peers.snapshot import ClientName, SnapshotParts
from apagent.v1 import peer_pb2 as pb

PeerEvent = PeerConnected | PeerPart | PeerSnapshot | PeerDelta | PeerDisconnected

_PART = pb.FeedMessage.KIND_SNAPSHOT_PART
_ENDS = (pb.FeedMessage.KIND_SNAPSHOT_END, pb.FeedMessage.KIND_DIFFERENCE_END)


class Bounds(NamedTuple):
    """What one peer may have here; what is beyond is refused."""

    sessions: int = 4_000_000
    """About 600 MB, and far beyond what one AP's conntrack holds."""
    claims: int = 1_000_000
    """Clients that it claims."""


BOUNDS = Bounds()


class Follower:
    """The position in a peer's feed, and what each message there says.

    `tables` are what we hold, and what `take_untrusted` tells must reach them in its order.
    """

    def __init__(
        self,
        peer: ApId,
        networks: Iterable[Network],
        tables: Mapping[NetworkName, SessionTables],
        bounds: Bounds = BOUNDS,
    ) -> None:
        self.peer = peer
        self.state = PeerState.CONNECTING
        self.reason = ""
        """Why the feed broke last; empty while it runs."""
        self.epoch = 0
        self.sequence = 0
        """The position up to which the feed has been told."""
        self.version = 0
        """The protocol's version in use; 0: the peer has not answered yet."""
        self.snapshots = 0
        """Whole ones."""
        self.differences = 0
        """Snapshots without what we held."""
        self.deltas = 0
        self.changes = 0
        """Sessions that were received, opened or closed, in any kind of message."""
        self._reader = PeerReader(peer, networks)
        self._tables = tables
        self._bounds = bounds
        self._claimed: set[ClientName] = set()
        """Clients that the peer claims now."""
        self._connected = False
        self._parts: SnapshotParts | None = None
        self._buckets = 0
        """How many the digests have that this subscription sent; 0: none were sent."""

    @property
    def refused(self) -> int:
        """Statements of this peer that were refused."""
        return self._reader.refused

    @property
    def in_sync(self) -> bool:
        """Whether all that the peer has said so far has been told."""
        return self.state is PeerState.IN_SYNC

    def request(self, me: ApId) -> pb.WatchRequest:
        """Ask for what follows; what was heard of an unfinished snapshot is of no more use."""
        self._parts = None
        self._buckets = 0
        request = pb.WatchRequest(
            subscriber=me,
            epoch=self.epoch,
            sequence=self.sequence,
            protocol_version=versions.HIGHEST,
        )
        if self.epoch and versions.HIGHEST >= versions.WITH_DIFFERENCES:
            digests = {name: tables.digest(self.peer) for name, tables in self._tables.items()}
            self._buckets = bucket_count(self._held())
            request.held.CopyFrom(digest_message(feed_digest(digests, self._buckets)))
        return request

    def take_untrusted(self, message: pb.FeedMessage) -> Iterator[PeerEvent]:
        """What `message` tells, to be taken in one after the other. Raises PeerFault."""
        statements = self._reader.read_untrusted(message)
        self.version = message.protocol_version
        self.changes += sum(map(len, statements.tables.values()))
        is_delta = message.kind == pb.FeedMessage.KIND_DELTA
        self._bound_sessions(statements.tables, closes=is_delta)
        if is_delta:
            yield from self._take_delta_untrusted(message, statements)
        elif message.kind == _PART or message.kind in _ENDS:
            yield from self._take_snapshot_untrusted(message, statements)
        elif message.kind == pb.FeedMessage.KIND_UNSPECIFIED:
            raise PeerFault(f"peer {self.peer}: sent a message of no kind")

    def lose(self, reason: str) -> Iterator[PeerEvent]:
        """The feed broke."""
        self.reason = reason
        if self._connected:
            self._connected = False
            self.state = PeerState.LOST
            yield PeerDisconnected(self.peer, reason)

    def start_over(self) -> None:
        """Forget the position: the peer said what can't be, so let it say everything again."""
        self.epoch = self.sequence = 0

    def _held(self) -> int:
        return sum(len(tables.table(self.peer)) for tables in self._tables.values())

    def _bound_sessions(self, tables: Tables, *, closes: bool) -> None:
        """Take out the sessions for which there is no room; what a message `closes` makes some.

        They are missing here until a snapshot says them again and finds room. Each subscription
        asks once for what differs, so that they are no reason for another one.
        """
        if self._held() + sum(map(len, tables.values())) <= self._bounds.sessions:
            return
        room = self._bounds.sessions - self._held()
        new: list[tuple[NetworkName, FlowKey]] = []
        for network, changes in tables.items():
            held = self._tables[network].table(self.peer)
            if closes:
                room += sum(nat is None and key in held for key, nat in changes.items())
            new += [(network, k) for k, nat in changes.items() if nat is not None and k not in held]
        beyond = new[max(0, room) :]
        for network, key in beyond:
            del tables[network][key]
        if beyond:
            self._refuse("a session", self._bounds.sessions, len(beyond))

    def _bound_claims(self, claims: Iterable[Claim]) -> Iterator[Claim]:
        """The claims for which there is room. Call it for what is told in this order."""
        for claim in claims:
            client = (claim.network, claim.mac)
            if not _takes_room(claim):
                self._claimed.discard(client)
            elif client in self._claimed or len(self._claimed) < self._bounds.claims:
                self._claimed.add(client)
            else:
                self._refuse("a claim", self._bounds.claims, 1)
                continue
            yield claim

    def _refuse(self, what: str, bound: int, count: int) -> None:
        self._reader.refuse(f"{what} beyond the {bound} that one AP may have", count)

    def _take_delta_untrusted(
        self, message: pb.FeedMessage, statements: Statements
    ) -> Iterator[PeerEvent]:
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
        yield from self._connect()
        self.deltas += 1
        self._buckets = 0
        self._reach(message)
        claims = tuple(self._bound_claims(statements.claims))
        yield PeerDelta(self.peer, message.clock, statements.tables, claims, statements.anchor)

    def _take_snapshot_untrusted(
        self, message: pb.FeedMessage, statements: Statements
    ) -> Iterator[PeerEvent]:
        yield from self._connect()
        if self._parts is None:
            if self.state is PeerState.IN_SYNC:
                # What is gone by this one is judged by our tables: all before it has to be in them.
                yield PeerPart(self.peer)
            self.state = PeerState.SYNCING
            self._parts = SnapshotParts(
                self.peer, message.epoch, message.sequence, self._bounds.claims
            )
        parts = self._parts
        opened = parts.add_untrusted(message.epoch, message.sequence, statements)
        if beyond := parts.take_claims_beyond():
            self._refuse("a claim", self._bounds.claims, beyond)
        if opened:
            yield PeerPart(self.peer, opened)
        if message.kind == _PART:
            return
        differing = self._differing_untrusted(message)
        restarted = message.epoch != self.epoch
        for changes in parts.rest(self._tables, differing, restarted=restarted):
            yield PeerPart(self.peer, changes)
        self.snapshots += differing is None
        self.differences += differing is not None
        self._parts = None
        self._buckets = 0
        self._reach(message)
        claims = tuple(parts.claims.values())
        self._claimed = {client for client, claim in parts.claims.items() if _takes_room(claim)}
        yield PeerSnapshot(self.peer, message.clock, None, claims, statements.anchor)

    def _differing_untrusted(self, message: pb.FeedMessage) -> Buckets | None:
        """What a snapshot is about by its last part; None: everything."""
        if message.kind == pb.FeedMessage.KIND_SNAPSHOT_END:
            return None
        if not self._buckets or any(bucket >= self._buckets for bucket in message.differing):
            raise PeerFault(
                f"peer {self.peer}: sent a difference of buckets {list(message.differing)[-3:]}, "
                f"asked for {self._buckets}"
            )
        return Buckets(self._buckets, frozenset(message.differing))

    def _connect(self) -> Iterator[PeerEvent]:
        if not self._connected:
            self._connected = True
            self.state, self.reason = PeerState.SYNCING, ""
            yield PeerConnected(self.peer)

    def _reach(self, message: pb.FeedMessage) -> None:
        self.epoch, self.sequence = message.epoch, message.sequence
        self.state = PeerState.IN_SYNC


def _takes_room(claim: Claim) -> bool:
    """Of clients that have left but a few are remembered (`core/clients.py`)."""
    return not (claim.released or claim.withdrawn)
