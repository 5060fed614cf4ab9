"""The door for peer input: what comes through, what is refused, and that nothing else happens."""

from __future__ import annotations

import logging
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apagent.core.domain import Network
from apagent.core.feed import FeedContents, FeedDelta, FeedSnapshot
from apagent.core.model import (
    ICMP,
    TCP,
    UDP,
    AnchorMode,
    AnchorStatement,
    ApId,
    Claim,
    Flow,
    FlowKey,
    Hold,
    Mac,
    Nat,
    NatAddress,
    NetworkAnchor,
    NetworkName,
    Translation,
)
from apagent.errors import PeerFault
from apagent.peers import versions
from apagent.peers.convert import (
    GENERATION_LIMIT,
    LOG_INTERVAL_S,
    MAX_ADDRESSES,
    PeerReader,
    delta_message,
    snapshot_messages,
)
from apagent.v1 import peer_pb2 as pb

PEER = ApId("ap2")
NETWORK = Network(
    name=NetworkName("lan"),
    client_interface="br-lan",
    prefix=IPv4Network("10.77.0.0/16"),
    gateway=IPv4Address("10.77.0.1"),
    vni=77,
    uplink="wan",
    nat_address=None,
)
LAN = NETWORK.name
CLIENT = IPv4Address("10.77.3.4")
SERVER = IPv4Address("198.51.100.1")
NAT = Translation(IPv4Address("192.0.2.1"), 50000).packed
MAC = Mac("02:00:00:00:00:01")


def reader() -> PeerReader:
    return PeerReader(PEER, [NETWORK], now=lambda: 0.0)


def flow(protocol: int = TCP, port: int = 40000) -> FlowKey:
    return Flow(protocol, CLIENT, port, SERVER, 0 if protocol == ICMP else 443).key


def message(**fields: Any) -> pb.FeedMessage:
    header = {"kind": "KIND_DELTA", "ap": PEER, "protocol_version": versions.HIGHEST}
    return pb.FeedMessage(**{**header, **fields})


def opened(**fields: int) -> pb.FeedMessage:
    """A message with a good session, and one that differs from it in `fields`."""
    base = {
        "client": int(CLIENT),
        "remote": int(SERVER),
        "protocol": TCP,
        "client_port": 1,
        "remote_port": 443,
    }
    nat_port = fields.pop("nat_port", 1)
    sessions = [
        {"flow": base, "nat_address": 1, "nat_port": 1},
        {"flow": base | {"client_port": 2} | fields, "nat_address": 1, "nat_port": nat_port},
    ]
    return message(tables=[{"network": LAN, "opened": sessions}])


def claimed(**fields: Any) -> pb.FeedMessage:
    base = {"network": LAN, "mac": bytes.fromhex("020000000001"), "generation": 1}
    return message(claims=[base, base | fields])


STATED = Claim(LAN, MAC, PEER, 5, frozenset({CLIENT}))


def columns(*flows: FlowKey, nats: bytes | None = None) -> pb.FeedMessage:
    """Opened sessions in columns."""
    table = {
        "network": LAN,
        "opened_flows": b"".join(flows),
        "opened_nats": b"".join([NAT] * len(flows)) if nats is None else nats,
    }
    return message(tables=[table])


@pytest.mark.parametrize(
    "bad",
    [
        Flow(TCP, IPv4Address("10.78.0.4"), 1, SERVER, 443),
        Flow(TCP, NETWORK.gateway, 1, SERVER, 443),
        Flow(TCP, NETWORK.prefix.broadcast_address, 1, SERVER, 443),
        Flow(TCP, CLIENT, 1, NETWORK.gateway, 443),
        Flow(47, CLIENT, 1, SERVER, 443),
    ],
)
def test_a_bad_session_in_a_column_is_refused_and_the_rest_holds(bad: Flow) -> None:
    peer = reader()
    got = peer.read_untrusted(columns(flow(TCP), bad.key, flow(UDP)))
    assert got.tables == {LAN: {flow(TCP): NAT, flow(UDP): NAT}}
    assert peer.refused == 1
    closed = {"network": LAN, "closed_flows": bad.key + flow(TCP)}
    assert peer.read_untrusted(message(tables=[closed])).tables == {LAN: {flow(TCP): None}}
    assert peer.refused == 2


@pytest.mark.parametrize(
    "bad",
    [
        columns(flow(TCP), nats=b""),
        columns(flow(TCP), nats=NAT + NAT),
        columns(flow(TCP), nats=NAT[1:]),
        columns(FlowKey(flow(TCP)[1:])),
        message(tables=[{"network": LAN, "closed_flows": b"x"}]),
        message(tables=[{"network": LAN, "opened_nats": NAT}]),
    ],
)
def test_columns_that_are_not_whole_are_refused_whole(bad: pb.FeedMessage) -> None:
    with pytest.raises(PeerFault, match="peer ap2: sent columns"):
        reader().read_untrusted(bad)


def test_flags_that_are_not_known_are_dropped() -> None:
    got = reader().read_untrusted(columns(flow(TCP), nats=NAT[:-1] + b"\xff"))
    assert got.tables == {LAN: {flow(TCP): NAT[:-1] + b"\x01"}}


def test_columns_of_an_unknown_network_are_counted() -> None:
    peer = reader()
    table = {"network": "x", "opened_flows": flow(TCP) * 3, "opened_nats": NAT * 3}
    assert peer.read_untrusted(message(tables=[table])).tables == {}
    assert peer.refused == 3


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "claim",
    [
        STATED,
        replace(STATED, released=True),
        replace(STATED, outdone=True),
        replace(STATED, withdrawn=True),
    ],
)
def test_a_delta_comes_back_as_it_was(claim: Claim, version: int) -> None:
    tables = {LAN: {flow(TCP): NAT, flow(UDP): NAT, flow(ICMP): None, flow(TCP, 1): None}}
    sent = delta_message(PEER, version, 9, FeedDelta(3, 4, 6, tables, (claim,)))
    got = reader().read_untrusted(pb.FeedMessage.FromString(sent.SerializeToString()))
    assert got.tables == tables
    assert got.claims == (claim,)
    assert (sent.epoch, sent.follows, sent.sequence, sent.clock) == (9, 3, 4, 6)


def test_a_snapshot_comes_in_parts_of_bounded_size_and_ends() -> None:
    sessions: dict[FlowKey, Nat] = {flow(TCP, port): NAT for port in range(1, 1300)}
    claims = [
        Claim(LAN, Mac(f"02:00:00:00:{n // 256:02x}:{n % 256:02x}"), PEER, 1) for n in range(600)
    ]
    parts = list(
        snapshot_messages(PEER, 2, 9, FeedSnapshot(4, FeedContents({LAN: sessions}, claims, 1)))
    )
    assert [p.kind for p in parts[:-1]] == [pb.FeedMessage.KIND_SNAPSHOT_PART] * 5
    assert parts[-1].kind == pb.FeedMessage.KIND_SNAPSHOT_END
    got = [reader().read_untrusted(part) for part in parts]
    assert max(len(g.tables.get(LAN, {})) for g in got) <= 512
    assert {k: v for g in got for k, v in g.tables.get(LAN, {}).items()} == sessions
    assert [c for g in got for c in g.claims] == claims


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"ap": "ap3"}, "says it is 'ap3'"),
        ({"protocol_version": 3}, "speaks version 3 of the feed, this agent versions 1 to 2"),
        ({"protocol_version": 0}, "speaks version 0"),
        ({"clock": GENERATION_LIMIT}, "clock"),
    ],
)
def test_a_message_that_is_not_the_peers_own_is_refused_whole(
    fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(PeerFault, match=says):
        reader().read_untrusted(message(**fields))


@pytest.mark.parametrize(
    "bad",
    [
        opened(client=int(IPv4Address("10.78.0.4"))),
        opened(client=int(NETWORK.gateway)),
        opened(client=int(NETWORK.prefix.network_address)),
        opened(client=int(NETWORK.prefix.broadcast_address)),
        opened(remote=int(NETWORK.gateway)),
        opened(protocol=47),
        opened(protocol=TCP + 256),
        opened(client_port=65536),
        opened(remote_port=65536),
        opened(nat_port=65536),
    ],
)
def test_a_bad_session_is_refused_and_the_rest_holds(bad: pb.FeedMessage) -> None:
    peer = reader()
    got = peer.read_untrusted(bad)
    assert got.tables == {
        LAN: {Flow(TCP, CLIENT, 1, SERVER, 443).key: Translation(IPv4Address(1), 1).packed}
    }
    assert peer.refused == 1


def test_a_session_without_a_flow_is_refused() -> None:
    peer = reader()
    assert peer.read_untrusted(message(tables=[{"network": LAN, "opened": [{}]}])).tables == {
        LAN: {}
    }
    assert peer.refused == 1


def test_an_end_of_anothers_session_is_refused() -> None:
    peer = reader()
    ends = [
        {"client": int(NETWORK.gateway)},
        {"client": int(CLIENT), "protocol": 300},
        {"client": int(CLIENT), "remote": int(SERVER), "protocol": TCP},
    ]
    got = peer.read_untrusted(message(tables=[{"network": LAN, "closed": ends}]))
    assert got.tables == {LAN: {Flow(TCP, CLIENT, 0, SERVER, 0).key: None}}
    assert peer.refused == 2


def test_sessions_of_an_unknown_network_are_refused_and_counted() -> None:
    peer = reader()
    sessions = [{"flow": {"client": int(CLIENT)}}] * 3
    assert peer.read_untrusted(message(tables=[{"network": "x", "opened": sessions}])).tables == {}
    assert peer.refused == 3


@pytest.mark.parametrize(
    "bad",
    [
        claimed(network="guest"),
        claimed(mac=b""),
        claimed(mac=bytes(5)),
        claimed(mac=bytes(6)),
        claimed(mac=bytes.fromhex("030000000001")),
        claimed(mac=bytes.fromhex("ffffffffffff")),
        claimed(generation=GENERATION_LIMIT),
        claimed(addresses=[int(CLIENT), int(SERVER)]),
        claimed(addresses=[int(NETWORK.gateway)]),
        claimed(addresses=[int(CLIENT)] * (MAX_ADDRESSES + 1)),
    ],
)
def test_a_bad_claim_is_refused_and_the_rest_holds(bad: pb.FeedMessage) -> None:
    peer = reader()
    assert peer.read_untrusted(bad).claims == (Claim(LAN, MAC, PEER, 1),)
    assert peer.refused == 1


@pytest.mark.parametrize("takeover", [True, False])
def test_what_an_ap_says_of_itself_as_an_anchor(takeover: bool) -> None:
    """Of addresses only where they may move."""
    home, other = (NatAddress(LAN, IPv4Address(f"203.0.113.{host}")) for host in (21, 22))
    whole = AnchorStatement(
        networks=(NetworkAnchor(LAN, AnchorMode.NO_UPLINK, home.address),),
        holds=(Hold(home, 7, offered_to=ApId("ap3"), successor=ApId("ap1")), Hold(other, 8)),
        ready=frozenset({home}),
        reclaims=True,
        taking=frozenset({other}),
    )
    modes_only = AnchorStatement((NetworkAnchor(LAN, AnchorMode.NO_UPLINK),), reclaims=True)
    sent = delta_message(PEER, versions.HIGHEST, 1, FeedDelta(0, 1, 9, anchor=whole))
    made = PeerReader(PEER, [replace(NETWORK, takeover=takeover)], now=lambda: 0.0)
    assert made.read_untrusted(sent).anchor == (whole if takeover else modes_only)


def test_refusals_are_logged_at_a_bounded_rate(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    peer = PeerReader(PEER, [NETWORK], now=lambda: now)
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            peer.read_untrusted(claimed(mac=b""))
        assert len(caplog.records) == 1
        now = LOG_INTERVAL_S
        peer.read_untrusted(claimed(mac=b""))
    assert "peer ap2: refused 5 statements" in caplog.messages[1]
    assert peer.refused == 6


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                name: st.integers(0, 2**32 - 1) | st.just(int(CLIENT)) | st.integers(0, 70000)
                for name in ("client", "remote", "protocol", "client_port", "remote_port")
            }
        ),
        max_size=5,
    ),
    st.lists(
        st.fixed_dictionaries(
            {
                "network": st.text(max_size=5) | st.just("lan"),
                "mac": st.binary(max_size=8),
                "generation": st.integers(0, 2**64 - 1),
                "addresses": st.lists(st.integers(0, 2**32 - 1), max_size=3),
            }
        ),
        max_size=5,
    ),
)
def test_any_statements_are_either_taken_or_refused(
    flows: list[dict[str, int]], claims: list[dict[str, Any]]
) -> None:
    peer = reader()
    sent = message(
        tables=[{"network": LAN, "opened": [{"flow": f} for f in flows], "closed": flows}],
        claims=claims,
    )
    got = peer.read_untrusted(sent)
    assert all(Flow.of(key).client in NETWORK.prefix for key in got.tables[LAN])
    assert len(got.claims) <= len(claims)
    assert peer.refused <= 2 * len(flows) + len(claims)
