"""Netlink framing: what the kernel's headers and attributes look like, and what errors say."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator

import pytest
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg

from apagent.errors import KernelFault
from apagent.kernel import wire
from apagent.kernel.wire import HEADER, Message, Netlink, attribute, attributes, encode, split

RTM_GETLINK, RTM_NEWADDR, RTM_GETADDR, RTM_DELADDR = 18, 20, 22, 21
NETLINK_ROUTE = 0
REFUSED = Message(RTM_GETLINK, 0, struct.pack("=BxHiII", 0, 0, 1 << 30, 0, 0), "interface 2^30")
"""A request that needs no privilege and that every kernel refuses: there is no such interface."""


def message(body: bytes, type_: int = 16, flags: int = 0, sequence: int = 7) -> bytes:
    length = HEADER.size + len(body)
    return HEADER.pack(length, type_, flags, sequence, 0) + body + bytes(-length % 4)


@pytest.fixture
def netlink() -> Iterator[Netlink]:
    netlink = Netlink(NETLINK_ROUTE)
    yield netlink
    netlink.close()


def test_split_a_datagram() -> None:
    data = message(b"abc", 16, 2, 7) + message(b"", 17, 0, 8) + message(b"12345678", 18, 1, 9)
    assert list(split(data)) == [(16, 2, 7, b"abc"), (17, 0, 8, b""), (18, 1, 9, b"12345678")]


def test_split_nothing() -> None:
    assert list(split(b"")) == []
    assert list(split(bytes(HEADER.size - 1))) == []


@pytest.mark.parametrize("cut", range(1, 12))
def test_split_ends_at_a_message_that_is_cut_short(cut: int) -> None:
    data = message(b"whole") + message(b"12345678")
    assert [body for *_, body in split(data[:-cut])] == [b"whole"]


def test_split_ends_at_a_length_that_can_not_be() -> None:
    assert list(split(HEADER.pack(3, 1, 0, 0, 0) + bytes(32))) == []


def test_attributes_are_padded_to_four_bytes() -> None:
    packed = attribute(3, b"lan\0x") + attribute(4, b"") + attribute(5, b"1234")
    assert packed.hex() == "09000300" + b"lan\0x".hex() + "000000" + "04000400" + "0800050031323334"
    assert list(attributes(packed)) == [(3, b"lan\0x"), (4, b""), (5, b"1234")]


def test_attributes_from_an_offset() -> None:
    assert list(attributes(b"head" + attribute(1, b"x"), 4)) == [(1, b"x")]


def test_flags_of_an_attribute_are_no_part_of_its_type() -> None:
    nested, network_order = 0x8000, 0x4000
    packed = attribute(nested | 1, b"n") + attribute(network_order | 2, b"o")
    assert list(attributes(packed)) == [(1, b"n"), (2, b"o")]


@pytest.mark.parametrize("data", [b"\x03\x00\x01\x00", b"\x09\x00\x01\x00abcd", b"\x08\x00"])
def test_attributes_end_at_one_that_is_cut_short(data: bytes) -> None:
    assert list(attributes(attribute(1, b"whole") + data)) == [(1, b"whole")]


def test_encode_leaves_the_header_out() -> None:
    address = ifaddrmsg()
    address["family"], address["prefixlen"], address["index"] = 2, 32, 5
    address["attrs"] = [("IFA_LOCAL", "10.0.0.1")]
    assert encode(address) == struct.pack("=BBBBI", 2, 32, 0, 0, 5) + attribute(2, b"\x0a\0\0\x01")


def extended(text: str, capped: bool, original: int) -> tuple[int, bytes]:
    """Flags and body of an error: code, the request's header, perhaps its body, the text."""
    header = HEADER.pack(HEADER.size + original, 16, 0, 7, 0)
    echoed = b"" if capped else bytes(original + -original % 4)
    flags = wire.NLM_F_ACK_TLVS | (wire.NLM_F_CAPPED if capped else 0)
    words = attribute(1, text.encode() + b"\0")
    return flags, struct.pack("=i", -errno.EINVAL) + header + echoed + attribute(
        2, bytes(4)
    ) + words


@pytest.mark.parametrize("capped", [True, False])
@pytest.mark.parametrize("original", [0, 5, 8])
def test_the_kernel_s_own_words_are_found(capped: bool, original: int) -> None:
    assert wire._extended_ack(*extended("No such thing", capped, original)) == "No such thing"


def test_without_words_the_errno_speaks() -> None:
    assert wire._extended_ack(0, struct.pack("=i", -errno.EINVAL) + bytes(16)) == ""
    assert wire._reason(errno.ENODEV, "") == "No such device (ENODEV)"
    assert wire._reason(errno.EINVAL, "Unknown thing") == "Unknown thing (EINVAL)"
    assert "9999" in wire._reason(9999, "")


def test_a_dump_of_the_interfaces(netlink: Netlink) -> None:
    everything = Message(RTM_GETLINK, wire.NLM_F_DUMP, struct.pack("=BxHiII", 0, 0, 0, 0, 0))
    names = [dict(attributes(body, 16))[3] for body in netlink.dump(everything)]
    assert b"lo\0" in names
    assert len(netlink.table(everything)) == len(names)


def test_a_single_object_is_a_dump_of_one(netlink: Netlink) -> None:
    one = Message(RTM_GETLINK, 0, struct.pack("=BxHiII", 0, 0, 1, 0, 0))
    assert [dict(attributes(body, 16))[3] for body in netlink.dump(one)] == [b"lo\0"]


def test_a_refused_dump_says_what_and_why(netlink: Netlink) -> None:
    with pytest.raises(KernelFault, match=r"interface 2\^30: .*ENODEV") as caught:
        list(netlink.dump(REFUSED))
    assert caught.value.errno == errno.ENODEV


def test_the_first_of_many_failures_is_raised(netlink: Netlink) -> None:
    unknown = Message(RTM_GETLINK, 0, struct.pack("=BxHiII", 0, 0, 0, 0, 0), "second")
    with pytest.raises(KernelFault, match=r"^interface 2\^30: "):
        netlink.request([REFUSED, unknown, REFUSED])
    with pytest.raises(KernelFault, match=r"^second: "):
        netlink.request([REFUSED, unknown], ignore=frozenset({errno.ENODEV}))


def test_more_failures_than_one_call_takes(netlink: Netlink) -> None:
    many = [REFUSED] * (3 * wire._REQUESTS_A_CALL + 1)
    netlink.request(many, ignore=frozenset({errno.ENODEV}))
    with pytest.raises(KernelFault, match=r"interface 2\^30"):
        netlink.request(many)
    assert netlink.granted_buffer > 0


def test_nothing_to_ask(netlink: Netlink) -> None:
    netlink.request([])


def test_answers_of_an_abandoned_dump_are_passed_over(netlink: Netlink) -> None:
    everything = Message(RTM_GETLINK, wire.NLM_F_DUMP, struct.pack("=BxHiII", 0, 0, 0, 0, 0))
    next(iter(netlink.dump(everything)))
    netlink.request([REFUSED], ignore=frozenset({errno.ENODEV}))
    assert netlink.table(everything)


def test_sequence_numbers_start_again_before_they_overflow(netlink: Netlink) -> None:
    netlink._sequence = 0xFFFFFFFE
    netlink.request([REFUSED] * 4, ignore=frozenset({errno.ENODEV}))
    assert netlink._sequence < 10


def test_no_events_are_no_wait(netlink: Netlink) -> None:
    assert netlink.events(bytearray(64)) == 0


def test_a_group_that_does_not_exist_is_named() -> None:
    with pytest.raises(KernelFault, match="groups"):
        Netlink(NETLINK_ROUTE, [100000])


def test_a_family_that_does_not_exist_is_named() -> None:
    with pytest.raises(KernelFault, match="netlink family 31"):
        Netlink(31)
