"""Digests of tables: equal for equal tables alone, whatever led to them."""

from __future__ import annotations

import struct
from hashlib import blake2b
from itertools import permutations
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apagent.core.digest import (
    BUCKETS,
    Buckets,
    FeedDigest,
    TableDigest,
    bucket_count,
    checksum,
    digest_of,
    feed_digest,
)
from apagent.core.model import UNKNOWN_NAT, FlowKey, Nat, NetworkName, stamped
from apagent.core.session_tables import SessionTables
from tests.domains import AP1, AP2, LAN, NAT, OTHER_NAT, at, tcp, udp

GUEST = NetworkName("guest")
FEW = 64
"""Buckets."""

Table = dict[FlowKey, Nat]

keys = st.integers(1, 8).flatmap(lambda n: st.sampled_from([tcp(n), udp(n)]))
said = st.sampled_from([NAT, OTHER_NAT, at(1), at(2), at(1, OTHER_NAT)])
nats = said | st.just(UNKNOWN_NAT)
tables = st.dictionaries(keys, said, max_size=8)
held_tables = st.dictionaries(keys, nats, max_size=8)


def digest(table: Table, buckets: int = FEW) -> FeedDigest:
    return feed_digest({LAN: digest_of(table.items())}, buckets)


def differing(here: Table, there: Table, *, restarted: bool = False) -> Buckets:
    return digest(here).differing(digest(there), restarted=restarted)


@given(st.lists(st.tuples(keys, nats | st.none()), max_size=40), st.sampled_from([1, 16, BUCKETS]))
def test_what_is_kept_up_to_date_equals_what_is_made_anew(
    edits: list[tuple[FlowKey, Nat | None]], buckets: int
) -> None:
    kept = SessionTables(AP1, [AP2])
    for key, nat in edits:
        kept.apply(AP2, {key: nat})
    table = dict(kept.table(AP2))
    assert feed_digest({LAN: kept.digest(AP2)}, buckets) == digest(table, buckets)
    assert checksum({LAN: kept.digest(AP2)}) == checksum({LAN: digest_of(table.items())})


@given(tables, held_tables)
def test_the_buckets_that_differ_are_those_of_the_sessions_that_differ(
    here: Table, there: Table
) -> None:
    wrong = {key for key in here.keys() | there.keys() if here.get(key) != there.get(key)}
    assert differing(here, there).numbers == {crc32(key) % FEW for key in wrong}
    same = checksum({LAN: digest_of(here.items())}) == checksum({LAN: digest_of(there.items())})
    assert same == (here == there)


@given(tables, held_tables)
def test_after_a_restart_what_is_held_counts_without_its_generations(
    here: Table, there: Table
) -> None:
    aged = {key: stamped(nat, 0) for key, nat in there.items()}
    assert differing(here, there, restarted=True) == differing(here, aged)


@given(tables, st.sampled_from([1, 2, 64]))
def test_with_fewer_buckets_the_same_sessions_are_found(table: Table, buckets: int) -> None:
    found = digest(table, buckets).differing(digest({}, buckets), restarted=False)
    assert found.of(table) == list(table)
    assert len(found.numbers) <= len(table)


@pytest.mark.parametrize("other", list(permutations((NAT, OTHER_NAT, at(1), at(2))))[1:])
def test_sessions_that_swap_translations_or_generations_are_others(other: tuple[Nat, ...]) -> None:
    swapped = [tcp(n) for n in range(1, 5)]
    here = digest_of(zip(swapped, (NAT, OTHER_NAT, at(1), at(2)), strict=True))
    there = digest_of(zip(swapped, other, strict=True))
    assert checksum({LAN: here}) != checksum({LAN: there})


def test_keys_that_differ_in_patterns_do_not_cancel_out() -> None:
    """A linear hash (CRC, Adler) sums up to the same for such sets."""
    even, odd = (digest_of((tcp(n), NAT) for n in ports) for ports in ((0, 3, 5, 6), (1, 2, 4, 7)))
    assert checksum({LAN: even}) != checksum({LAN: odd})


def test_the_same_session_in_another_network_is_another() -> None:
    one = digest_of([(tcp(1), NAT)])
    assert checksum({LAN: one}) != checksum({GUEST: one})
    here, there = (feed_digest({name: one}, 4) for name in (LAN, GUEST))
    assert here.differing(there, restarted=False).of([tcp(1)])


def test_networks_without_sessions_make_no_difference() -> None:
    one, none = digest_of([(tcp(1), NAT)]), TableDigest()
    assert checksum({LAN: one, GUEST: none}) == checksum({LAN: one})
    assert feed_digest({LAN: one, GUEST: none}, 4) == feed_digest({LAN: one}, 4)
    assert checksum({LAN: none}) == checksum({}) == "000000000000"


def test_the_digest_is_that_of_the_protocol() -> None:
    """As `peer.proto` defines it, written down a second time."""
    sessions = {tcp(1): at(5), udp(2): at(7, OTHER_NAT)}
    weight = int.from_bytes(blake2b(b"lan", digest_size=7).digest(), "little") + 1
    hashes, generations = [0] * 2, [0] * 2
    for key, nat in sessions.items():
        address, port, generation, established = struct.unpack(">4sHIB", nat)
        body = key + address + struct.pack(">HB", port, established)
        first, second = struct.unpack("<QQ", blake2b(body, digest_size=16).digest())
        hashes[crc32(key) % 2] += weight * first
        generations[crc32(key) % 2] += weight * second * generation
    modulus = 2**61 - 1
    expected = FeedDigest([h % modulus for h in hashes], [g % modulus for g in generations])
    assert digest(sessions, 2) == expected


@pytest.mark.parametrize(
    ("sessions", "buckets"),
    [(0, 1), (1, 1), (2, 2), (5, 8), (4096, 4096), (4097, 4096), (10**6, 4096)],
)
def test_there_are_about_as_many_buckets_as_sessions(sessions: int, buckets: int) -> None:
    assert bucket_count(sessions) == buckets
