"""Elements of the session maps: packed for the kernel and parsed from it."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address

from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink.nfnetlink.nftsocket import (
    NFT_MSG_DELSETELEM,
    NFT_MSG_NEWSETELEM,
    nft_set_elem_list_msg,
)

from apagent.core.model import ICMP, TCP, UDP, Flow, FlowKey, Mac, socket_of
from apagent.kernel.nft.elements import (
    CHANGES_PER_TRANSACTION,
    CLIENT_SIZE,
    ECHO_SIZE,
    FLOW_SIZE,
    SOCKET_SIZE,
    ElementChange,
    pack_client,
    pack_data,
    pack_echo,
    pack_flow,
    pack_socket,
    parse_elements,
    transactions,
    unpack_client,
    unpack_echo,
    unpack_flow,
    unpack_socket,
)
from apagent.kernel.nft.messages import message_type
from apagent.kernel.nft.sets import anchor_number, anchor_value
from apagent.kernel.wire import HEADER, Message
from tests.domains import ANN, tcp, udp

NEW, DELETE = message_type(NFT_MSG_NEWSETELEM), message_type(NFT_MSG_DELSETELEM)
VALUE = anchor_value(2)

ports = st.integers(0, 0xFFFF)
addresses = st.integers(0, 0xFFFFFFFF).map(IPv4Address)
port_flows = st.builds(Flow, st.sampled_from([TCP, UDP]), addresses, ports, addresses, ports)
echoes = st.builds(Flow, st.just(ICMP), addresses, ports, addresses, st.just(0))


def added(key: bytes, data: bytes = b"") -> ElementChange:
    return ElementChange("lan_flows", key, deleted=False, data=data)


def messages(*changes: ElementChange) -> list[Message]:
    [batch] = transactions("apagent", changes)
    return batch


@given(port_flows)
def test_a_flow_survives_the_kernel_form(flow: Flow) -> None:
    packed = pack_flow(flow.key)
    assert len(packed) == FLOW_SIZE
    assert unpack_flow(packed) == flow.key


@given(echoes)
def test_an_echo_survives_the_kernel_form(flow: Flow) -> None:
    packed = pack_echo(flow.key)
    assert len(packed) == ECHO_SIZE
    assert unpack_echo(packed) == flow.key


@given(port_flows)
def test_a_socket_survives_the_kernel_form(flow: Flow) -> None:
    packed = pack_socket(socket_of(flow.key))
    assert len(packed) == SOCKET_SIZE
    assert unpack_socket(packed) == socket_of(flow.key)


@given(addresses, st.binary(min_size=6, max_size=6))
def test_a_client_survives_the_kernel_form(address: IPv4Address, mac: bytes) -> None:
    packed = pack_client(address, Mac(mac.hex(":")))
    assert len(packed) == CLIENT_SIZE
    assert unpack_client(packed) == (address, mac.hex(":"))


def test_fields_are_padded_to_four_bytes_in_network_order() -> None:
    flow = Flow(TCP, IPv4Address("10.77.0.1"), 1234, IPv4Address("192.0.2.1"), 80)
    assert pack_flow(flow.key).hex(" ", -4) == "0a4d0001 c0000201 06000000 04d20000 00500000"
    assert pack_socket(socket_of(flow.key)).hex(" ", -4) == "0a4d0001 06000000 04d20000"
    assert pack_client(flow.client, ANN).hex(" ", -4) == "0a4d0001 02000000 000a0000"


def test_an_anchor_is_a_priority_in_host_order() -> None:
    assert anchor_value(2) == struct.pack("=I", 0x61700002)
    assert anchor_number(anchor_value(2)) == 2
    assert anchor_number(struct.pack("=I", 0x00010002)) is None


@given(st.lists(port_flows, min_size=1, unique=True))
def test_what_is_packed_parses_back(flows: list[Flow]) -> None:
    [message] = messages(*(added(pack_flow(flow.key), pack_data(VALUE)) for flow in flows))
    elements = parse_elements(message.body, FLOW_SIZE)
    assert [(unpack_flow(key), value) for key, value in elements] == [
        (flow.key, VALUE) for flow in flows
    ]


def test_an_element_of_a_set_has_no_value() -> None:
    [message] = messages(added(bytes(4)))
    assert list(parse_elements(message.body, 4)) == [(bytes(4), b"")]


def test_pyroute2_reads_what_is_packed() -> None:
    [message] = messages(added(pack_flow(tcp(1)), pack_data(VALUE)))
    header = HEADER.pack(HEADER.size + len(message.body), message.type, 0, 0, 0)
    decoded = nft_set_elem_list_msg(header + message.body)
    decoded.decode()
    assert decoded.get_attr("NFTA_SET_ELEM_LIST_TABLE") == "apagent"
    assert decoded.get_attr("NFTA_SET_ELEM_LIST_SET") == "lan_flows"
    [element] = decoded.get_attr("NFTA_SET_ELEM_LIST_ELEMENTS")
    key, data = element.get_attr("NFTA_SET_ELEM_KEY"), element.get_attr("NFTA_SET_ELEM_DATA")
    assert key.get_attr("NFTA_DATA_VALUE") == pack_flow(tcp(1))
    assert data.get_attr("NFTA_DATA_VALUE") == VALUE


def test_a_changed_value_is_deleted_and_added_in_one_transaction() -> None:
    key = pack_flow(tcp(1))
    change = ElementChange("lan_flows", key, deleted=True, data=pack_data(VALUE))
    deletion, addition = messages(change)
    assert (deletion.type, addition.type) == (DELETE, NEW)
    assert list(parse_elements(deletion.body, FLOW_SIZE)) == [(key, b"")]
    assert list(parse_elements(addition.body, FLOW_SIZE)) == [(key, VALUE)]


def test_sets_have_messages_of_their_own() -> None:
    flow, socket = pack_flow(udp(1)), pack_socket(socket_of(udp(1)))
    batch = messages(
        added(flow, pack_data(VALUE)),
        ElementChange("lan_sockets", socket, deleted=True, data=None),
    )
    assert [message.what for message in batch] == [
        "elements of inet apagent lan_sockets",
        "elements of inet apagent lan_flows",
    ]


def test_thousands_of_elements_keep_the_limits_of_the_format() -> None:
    count = 2 * CHANGES_PER_TRANSACTION + 1
    keys = [pack_flow(FlowKey(bytes(4) + struct.pack(">I", n) + bytes(5))) for n in range(count)]
    batches = list(transactions("apagent", (added(key, pack_data(VALUE)) for key in keys)))
    bodies = [message.body for batch in batches for message in batch]
    parsed = [key for body in bodies for key, _ in parse_elements(body, FLOW_SIZE)]
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert parsed == keys


def test_no_changes_make_no_transaction() -> None:
    assert list(transactions("apagent", [])) == []
