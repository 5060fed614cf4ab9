"""Digests of session tables: what two agents compare, instead of the tables themselves.

A table's sessions are spread over buckets by their keys, and a bucket's digest is the sum of its
sessions' hashes: the same in whatever order they came and went, and cheap to keep up to date. Where
two digests of a bucket are equal, so are the sessions in it; where they are not, the bucket's
sessions travel.

The generations are summed up apart, each times a random number of its session's. So it can be told
of a table, without walking through it, whether it would be equal were all generations 0: that is
what an agent says of its sessions after a restart.

Sums are kept exact and are reduced modulo a prime where they leave this module. For tables that
differ, be it in generations alone, they are equal with a probability of 2**-61 for each bucket.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple
from zlib import crc32

from apagent.core.model import (
    NAT_PARTS,
    UNKNOWN_NAT,
    FlowKey,
    Nat,
    NetworkName,
    SessionChanges,
    Sessions,
)

BUCKETS = 4096
"""Buckets of a table, a power of two. By folding, it also has any smaller power of two of them."""

_MASK = BUCKETS - 1
_MODULUS = (1 << 61) - 1
_CHECKSUM_DIGITS = 12
_EMPTY_HASH = blake2b(digest_size=16)
"""Copying it takes a third less time than making one for each session."""
_HALVES: Callable[[bytes], tuple[int, int]] = struct.Struct("<QQ").unpack
_PARTS: Callable[[bytes], tuple[bytes, int, bytes]] = NAT_PARTS.unpack


class Buckets(NamedTuple):
    """Some of the `total` buckets of a table, by their numbers from 0."""

    total: int
    numbers: frozenset[int]

    def of(self, keys: Iterable[FlowKey]) -> list[FlowKey]:
        """The flows that belong to one of them."""
        mask, numbers = self.total - 1, self.numbers
        return [key for key in keys if crc32(key) & mask in numbers]


class TableDigest:
    """The digest of one AP's table in one network. Tell it every change."""

    def __init__(self) -> None:
        self._sessions = [0] * BUCKETS
        self._generations = [0] * BUCKETS

    def follow(self, table: Sessions, changes: SessionChanges) -> None:
        """Note a batch of changes that are about to be made to `table`; None: a flow has ended."""
        sessions, generations = self._sessions, self._generations
        known = table.get
        for key, new in changes.items():
            bucket = crc32(key) & _MASK
            if (old := known(key)) is not None:
                session, generation = _hashes(key, old)
                sessions[bucket] -= session
                generations[bucket] -= generation
            if new is not None:
                session, generation = _hashes(key, new)
                sessions[bucket] += session
                generations[bucket] += generation

    def folded(self, count: int) -> tuple[list[int], list[int]]:
        """Sums of hashes and of generations, for `count` buckets (a power of two)."""
        return _fold(self._sessions, count), _fold(self._generations, count)

    def total(self) -> int:
        """The digest of the table in one number."""
        return sum(self._sessions) + sum(self._generations)


class FeedDigest(NamedTuple):
    """The digest of all that a feed says of sessions, in all networks, by bucket."""

    sessions: Sequence[int]
    generations: Sequence[int]

    def differing(self, held: FeedDigest, *, restarted: bool) -> Buckets:
        """The buckets in which a subscriber that holds `held` has other sessions.

        `restarted`: it takes all generations for 0 in those that are left out.
        """
        total = len(self.sessions)
        generations = [0] * total if restarted else held.generations
        here = zip(self.sessions, self.generations, strict=True)
        there = zip(held.sessions, generations, strict=True)
        pairs = enumerate(zip(here, there, strict=True))
        return Buckets(total, frozenset(bucket for bucket, (a, b) in pairs if a != b))


def feed_digest(tables: Mapping[NetworkName, TableDigest], count: int) -> FeedDigest:
    """The digest of one AP's tables together, in `count` buckets (a power of two)."""
    sessions, generations = [0] * count, [0] * count
    for name, table in tables.items():
        weight = _weight(name)
        for sums, more in zip((sessions, generations), table.folded(count), strict=True):
            for bucket, value in enumerate(more):
                if value:
                    sums[bucket] = (sums[bucket] + weight * value) % _MODULUS
    return FeedDigest(sessions, generations)


def bucket_count(sessions: int) -> int:
    """How many buckets tell enough of so many sessions: about one for each, within bounds."""
    return min(BUCKETS, 1 << max(0, sessions - 1).bit_length())


def checksum(tables: Mapping[NetworkName, TableDigest]) -> str:
    """One AP's tables together, for people to compare: hexadecimal digits, zeros where empty."""
    total = sum(_weight(name) * table.total() for name, table in tables.items()) % _MODULUS
    return f"{total:0{_CHECKSUM_DIGITS}x}"[-_CHECKSUM_DIGITS:]


def digest_of(sessions: Iterable[tuple[FlowKey, Nat]]) -> TableDigest:
    """The digest of a table with these sessions."""
    digest = TableDigest()
    for key, nat in sessions:
        digest.follow({}, {key: nat})
    return digest


def _hashes(key: FlowKey, nat: Nat) -> tuple[int, int]:
    """A number for the session without its generation, and its generation times another one.

    An adopted session equals nothing that an anchor says, so a cheap number will do: there are many
    of them at a start, and most go at once.
    """
    if nat == UNKNOWN_NAT:
        return crc32(key) + 1, 0
    translation, generation, state = _PARTS(nat)
    hashed = _EMPTY_HASH.copy()
    hashed.update(key + translation + state)
    session, factor = _HALVES(hashed.digest())
    return session, factor * generation


def _fold(sums: Sequence[int], count: int) -> list[int]:
    if count == len(sums):
        return list(sums)
    return [sum(sums[bucket::count]) for bucket in range(count)]


def _weight(network: NetworkName) -> int:
    """Tells networks apart in one sum: the same flow may exist in two."""
    return int.from_bytes(blake2b(network.encode(), digest_size=7).digest(), "little") + 1
