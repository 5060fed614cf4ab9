"""The fast reader of conntrack events says what the general one says, or leaves it to that one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apagent.core.domain import Network
from apagent.core.model import FlowKey, Nat, NetworkName, Translation
from apagent.kernel.conntrack import FlowParser
from apagent.kernel.port_flows import Changes, PortFlowReader
from apagent.kernel.wire import HEADER, split
from tests.domains import LAN, lan, takeover
from tests.unit.test_conntrack_parse import (
    ECHO_NEW,
    RECORDED,
    TCP_DESTROY,
    TCP_NEW,
    UDP_NEW,
    patched,
)

SIZE = 1024
NEW, DELETE = 0x100, 0x102
NETWORKS = (lan(), lan("zoo", "10.79.0.0/17", 79))
WITH_TAKEOVER = (takeover(), NETWORKS[1])
TCP_ESTABLISHED = patched(TCP_NEW, (TCP_NEW.index(b"\x01\x98"), b"\x01\x9e"))
"""The status with the bits for a reply and for both directions."""


def datagram(type_: int, body: bytes) -> bytes:
    return HEADER.pack(HEADER.size + len(body), type_, 0x600, 7, 0) + body


def read(
    datagrams: Iterable[bytes], networks: tuple[Network, ...] = NETWORKS
) -> tuple[dict[NetworkName, Changes], list[bytes]]:
    """What the fast reader says, and what it leaves."""
    buffer, lengths = bytearray(), []
    for one in datagrams:
        buffer += one[:SIZE].ljust(SIZE, b"\xee")
        lengths.append(len(one))
    changes: dict[NetworkName, Changes] = {network.name: {} for network in networks}
    left: list[bytes] = []
    PortFlowReader(networks, SIZE).read(buffer, lengths, changes, left.append)
    return changes, left


def by_the_general_parser(
    one: bytes, networks: tuple[Network, ...] = NETWORKS
) -> dict[NetworkName, dict[FlowKey, Nat | None]]:
    changes: dict[NetworkName, Changes] = {network.name: {} for network in networks}
    for type_, _, _, body in split(one):
        flow = FlowParser(networks).parse(body)
        if flow is not None:
            changes[flow.network][flow.key] = None if type_ == DELETE else flow.nat
    return changes


@pytest.mark.parametrize("networks", [NETWORKS, WITH_TAKEOVER])
@pytest.mark.parametrize(("type_", "body"), [(NEW, TCP_NEW), (DELETE, TCP_DESTROY), (NEW, UDP_NEW)])
def test_what_a_kernel_sends_for_tcp_and_udp_is_not_left(
    type_: int, body: bytes, networks: tuple[Network, ...]
) -> None:
    one = datagram(type_, body)
    changes, left = read([one], networks)
    assert left == []
    assert changes == by_the_general_parser(one, networks)
    assert len(changes[LAN]) == 1


@pytest.mark.parametrize(
    ("networks", "body", "established"),
    [
        (WITH_TAKEOVER, TCP_ESTABLISHED, True),
        (WITH_TAKEOVER, TCP_NEW, False),
        (NETWORKS, TCP_ESTABLISHED, False),
    ],
)
def test_with_takeover_a_session_says_whether_it_is_established(
    networks: tuple[Network, ...], body: bytes, established: bool
) -> None:
    changes, left = read([datagram(NEW, body)], networks)
    assert left == []
    [nat] = changes[LAN].values()
    assert nat is not None
    assert Translation.of(nat).established == established
    assert changes == by_the_general_parser(datagram(NEW, body), networks)


def test_an_echo_is_left_at_its_turn() -> None:
    changes, left = read([datagram(NEW, TCP_NEW), datagram(NEW, ECHO_NEW), datagram(NEW, UDP_NEW)])
    assert left == [datagram(NEW, ECHO_NEW)]
    assert len(changes[LAN]) == 2


def test_the_last_word_on_a_flow_holds() -> None:
    opened, ended = datagram(NEW, TCP_NEW), datagram(DELETE, TCP_DESTROY)
    assert list(read([opened, ended])[0][LAN].values()) == [None]
    assert list(read([ended, opened])[0][LAN].values()) != [None]


def test_a_network_with_a_zone_is_left() -> None:
    _, left = read([datagram(NEW, TCP_NEW)], (replace(lan(), zone=3),))
    assert len(left) == 1


recorded = st.sampled_from([body for body, _, _ in RECORDED.values()])
patches = st.lists(st.tuples(st.integers(0, 160), st.binary(min_size=1, max_size=4)), max_size=4)


@given(
    body=recorded,
    type_=st.sampled_from([NEW, DELETE, 0x101]),
    patched=patches,
    cut=st.one_of(st.none(), st.integers(0, 200)),
    networks=st.sampled_from([NETWORKS, WITH_TAKEOVER]),
)
def test_whatever_is_not_left_is_read_as_the_general_parser_reads_it(
    body: bytes,
    type_: int,
    patched: list[tuple[int, bytes]],
    cut: int | None,
    networks: tuple[Network, ...],
) -> None:
    one = bytearray(datagram(type_, body))
    for offset, new in patched:
        one[offset : offset + len(new)] = new
    data = bytes(one[:cut])
    changes, left = read([data], networks)
    if not left:
        assert changes == by_the_general_parser(data, networks)


@pytest.mark.parametrize("body", [TCP_NEW, UDP_NEW])
def test_what_a_kernel_lists_of_tcp_and_udp_is_not_left(body: bytes) -> None:
    listed = PortFlowReader(NETWORKS, SIZE).read_listed(body)
    assert listed is not None
    assert listed == FlowParser(NETWORKS).parse(body)


@given(
    body=recorded,
    patched=patches,
    cut=st.one_of(st.none(), st.integers(0, 200)),
    networks=st.sampled_from([NETWORKS, WITH_TAKEOVER]),
)
def test_whatever_of_a_listing_is_not_left_is_read_as_the_general_parser_reads_it(
    body: bytes,
    patched: list[tuple[int, bytes]],
    cut: int | None,
    networks: tuple[Network, ...],
) -> None:
    one = bytearray(body)
    for offset, new in patched:
        one[offset : offset + len(new)] = new
    listed = PortFlowReader(networks, SIZE).read_listed(bytes(one[:cut]))
    assert listed is None or listed == FlowParser(networks).parse(bytes(one[:cut]))
