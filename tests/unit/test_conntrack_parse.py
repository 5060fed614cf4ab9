"""The ctnetlink parser on messages that a kernel sent, and against pyroute2's decoder."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink.nfnetlink.nfctsocket import nfct_msg

from apagent.core.model import Flow, Translation
from apagent.kernel.conntrack import FlowParser, OurFlow, any_tuples, port_tuples
from apagent.kernel.wire import HEADER
from tests.domains import LAN, lan

# Events of Linux 6.18: the body of each, without netlink header. Replies of TCP and UDP come to
# 192.0.2.1 and another port than the client's.
TCP_NEW = bytes.fromhex(
    "020000003400018014000180080001000a4d0005080002007f0000031c00028005000100060000000600020"
    "09c41000006000300005000003400028014000180080001007f00000308000200c00002011c000280050001"
    "00060000000600020000500000060003007230000008000c00650d07e708000300000001980800070000000"
    "078300004802c0001800500010001000000050002000a000000050003000000000006000400030000000600"
    "050000000000"
)
TCP_DESTROY = bytes.fromhex(
    "020000003400018014000180080001000a4d0005080002007f0000031c00028005000100060000000600020"
    "09c41000006000300005000003400028014000180080001007f00000308000200c00002011c000280050001"
    "00060000000600020000500000060003007230000008000c00650d07e7080003000000039e0800070000069"
    "77f1c0009800c00010000000000000000020c00020000000000000000701c000a800c000100000000000000"
    "00010c000200000000000000003c100004800c0001800500010003000000"
)
UDP_NEW = bytes.fromhex(
    "020000003400018014000180080001000a4d0005080002007f0000031c00028005000100110000000600020"
    "09c42000006000300003500003400028014000180080001007f00000308000200c00002011c000280050001"
    "0011000000060002000035000006000300547100000"
    "8000c0046fb2d940800030000000198080007000000001e"
)
ECHO_NEW = bytes.fromhex(
    "020000003c00018014000180080001000a4d0005080002007f0000042400028005000100010000000600040"
    "012340000050005000800000005000600000000003c00028014000180080001007f00000408000200c00002"
    "0124000280050001000100000006000400123400000500050000000000050006000000000008000c00c23fa"
    "32b0800030000000198080007000000001e"
)

OUTSIDE = IPv4Address("192.0.2.1")
TCP_FLOW = Flow(6, IPv4Address("10.77.0.5"), 40001, IPv4Address("127.0.0.3"), 80)
UDP_FLOW = Flow(17, IPv4Address("10.77.0.5"), 40002, IPv4Address("127.0.0.3"), 53)
ECHO_FLOW = Flow(1, IPv4Address("10.77.0.5"), 0x1234, IPv4Address("127.0.0.4"), 0)
RECORDED = {
    "tcp new": (TCP_NEW, TCP_FLOW, Translation(OUTSIDE, 29232)),
    "tcp destroyed": (TCP_DESTROY, TCP_FLOW, Translation(OUTSIDE, 29232)),
    "udp new": (UDP_NEW, UDP_FLOW, Translation(OUTSIDE, 21617)),
    "echo new": (ECHO_NEW, ECHO_FLOW, Translation(OUTSIDE, 0x1234)),
}

ORIGINAL_SOURCE, ORIGINAL_PORT = 16, 44
REPLY_DESTINATION, REPLY_PORT = 76, 104
PROTOCOL = 36
"""Where fields stand in a recorded TCP or UDP message."""


def patched(body: bytes, *patches: tuple[int, bytes]) -> bytes:
    data = bytearray(body)
    for offset, new in patches:
        data[offset : offset + len(new)] = new
    return bytes(data)


@pytest.mark.parametrize(("body", "flow", "nat"), RECORDED.values(), ids=RECORDED)
def test_a_recorded_message_is_read(body: bytes, flow: Flow, nat: Translation) -> None:
    assert FlowParser([lan()]).parse(body) == OurFlow(LAN, flow.key, nat.packed)


@pytest.mark.parametrize("body", [TCP_NEW, TCP_DESTROY, UDP_NEW])
def test_both_ways_of_reading_ports_agree(body: bytes) -> None:
    assert port_tuples(body) == any_tuples(body) is not None


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(patched(TCP_NEW, (ORIGINAL_SOURCE, b"\x0a\x4e")), id="foreign source"),
        pytest.param(
            patched(
                TCP_NEW,
                (REPLY_DESTINATION, TCP_NEW[ORIGINAL_SOURCE:][:4]),
                (REPLY_PORT, TCP_NEW[ORIGINAL_PORT:][:2]),
            ),
            id="untranslated",
        ),
        pytest.param(patched(UDP_NEW, (PROTOCOL, b"\x84")), id="sctp"),
        pytest.param(patched(ECHO_NEW, (52, b"\x0d")), id="icmp timestamp request"),
        pytest.param(TCP_NEW[:4], id="no tuples"),
        pytest.param(TCP_NEW[:56], id="one tuple"),
    ],
)
def test_what_is_not_ours_is_left_out(body: bytes) -> None:
    assert FlowParser([lan()]).parse(body) is None


def test_a_changed_port_alone_is_a_translation() -> None:
    same_address = patched(TCP_NEW, (REPLY_DESTINATION, TCP_NEW[ORIGINAL_SOURCE:][:4]))
    flow = FlowParser([lan()]).parse(same_address)
    assert flow is not None
    assert Translation.of(flow.nat) == Translation(TCP_FLOW.client, 29232)


def test_attributes_in_another_order_are_read_all_the_same() -> None:
    original, reply = TCP_NEW[4:56], TCP_NEW[56:108]
    addresses, ports = original[4:24], original[24:]
    swapped = TCP_NEW[:4] + reply + original[:4] + ports + addresses + TCP_NEW[108:]
    assert port_tuples(swapped) is None
    assert FlowParser([lan()]).parse(swapped) == FlowParser([lan()]).parse(TCP_NEW)


def test_the_network_is_the_one_whose_prefix_holds_the_client() -> None:
    networks = [
        lan("guests", "10.78.0.0/16"),
        lan("cams", "10.77.0.4/30"),
        lan("lab", "10.79.0.0/16"),
    ]
    flow = FlowParser(networks).parse(TCP_NEW)
    assert flow is not None
    assert flow.network == "cams"


def by_pyroute2(body: bytes) -> tuple[Flow, Translation]:
    """What pyroute2 says about a TCP or UDP message."""
    message = nfct_msg(HEADER.pack(HEADER.size + len(body), 0x100, 0, 0, 0) + body)
    message.decode()
    original, reply = message.get_attr("CTA_TUPLE_ORIG"), message.get_attr("CTA_TUPLE_REPLY")
    ip, proto = original.get_attr("CTA_TUPLE_IP"), original.get_attr("CTA_TUPLE_PROTO")
    reply_ip, reply_proto = reply.get_attr("CTA_TUPLE_IP"), reply.get_attr("CTA_TUPLE_PROTO")
    flow = Flow(
        proto.get_attr("CTA_PROTO_NUM"),
        IPv4Address(ip.get_attr("CTA_IP_V4_SRC")),
        proto.get_attr("CTA_PROTO_SRC_PORT"),
        IPv4Address(ip.get_attr("CTA_IP_V4_DST")),
        proto.get_attr("CTA_PROTO_DST_PORT"),
    )
    address = IPv4Address(reply_ip.get_attr("CTA_IP_V4_DST"))
    return flow, Translation(address, reply_proto.get_attr("CTA_PROTO_DST_PORT"))


two_bytes = st.binary(min_size=2, max_size=2)


@given(
    body=st.sampled_from([TCP_NEW, TCP_DESTROY, UDP_NEW]),
    host=two_bytes,
    port=two_bytes,
    nat=st.binary(min_size=4, max_size=4),
    nat_port=two_bytes,
)
def test_the_parser_agrees_with_pyroute2(
    body: bytes, host: bytes, port: bytes, nat: bytes, nat_port: bytes
) -> None:
    message = patched(
        body,
        (ORIGINAL_SOURCE + 2, host),
        (ORIGINAL_PORT, port),
        (REPLY_DESTINATION, nat),
        (REPLY_PORT, nat_port),
    )
    flow, translation = by_pyroute2(message)
    expected = OurFlow(LAN, flow.key, translation.packed)
    untranslated = translation == Translation(flow.client, flow.client_port)
    assert FlowParser([lan()]).parse(message) == (None if untranslated else expected)
