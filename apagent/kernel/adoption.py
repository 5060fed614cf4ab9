"""Flows of another anchor as conntrack entries, so that they go on here.

An entry is given its reply tuple untranslated, and CTA_NAT_SRC says what to make of the client's
address and port. With the reply translated already the kernel would see nothing left to do, and the
packets would leave with the client's address (ctnetlink_setup_nat(), nf_conntrack_netlink.c).
A flow that was opened from outside, to a forwarded port, is given the entry that it had: what comes
to the NAT address, untranslated in both tuples, and CTA_NAT_DST says which client it is for. The
other way round, whoever opens it would be taken for the one who answers, and a SYN that is sent
again for an invalid packet (tcp_conntracks in nf_conntrack_proto_tcp.c).

We don't know how far a connection's sequence numbers are, so windows are not checked in either
direction (BE_LIBERAL). A connection that isn't known to be established is put into SYN_RECV, from
where both the rest of a handshake and data lead on, and counts as answered: conntrack would take a
packet in mid-connection for new else, and we reset those.

Numbers: linux/netfilter/nfnetlink_conntrack.h.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Iterator, Mapping

from apagent.core.model import (
    ESTABLISHED,
    ICMP,
    NAT_ADDRESS,
    PROTOCOL_OFFSET,
    STATE,
    TCP,
    TRANSLATION,
    UDP,
    FlowKey,
    Nat,
)
from apagent.kernel import sysctl
from apagent.kernel.wire import NLM_F_CREATE, NLM_F_EXCL, Message, attribute

_NEW = 1 << 8
"""IPCTNL_MSG_CT_NEW of NFNL_SUBSYS_CTNETLINK."""
_NFGEN_IPV4 = b"\x02\0\0\0"
_NESTED = 0x8000
_ORIGINAL, _REPLY, _STATUS, _PROTOINFO, _NAT_SOURCE, _TIMEOUT = 1, 2, 3, 4, 6, 7
_NAT_DESTINATION = 13
_PROTOINFO_TCP = 1
_TCP_STATE, _TCP_FLAGS_ORIGINAL, _TCP_FLAGS_REPLY = 1, 4, 5

_PORT_TUPLE = struct.Struct("=HH HH HH4s HH4s HH HHB3x HH2s2x HH2s2x")
_ECHO_TUPLE = struct.Struct("=HH HH HH4s HH4s HH HHB3x HH2s2x HHB3x HHB3x")
_NAT = struct.Struct("=HH HH4s HH4s HH HH2s2x HH2s2x")
"""Attribute headers (length and type) with their values between."""

_SEEN_REPLY, _ASSURED, _CONFIRMED = 0x02, 0x04, 0x08
"""linux/netfilter/nf_conntrack_common.h; an entry of the table is always confirmed."""
_SYN_RECV, _TCP_ESTABLISHED = 2, 3
_BE_LIBERAL = 0x08
"""linux/netfilter/nf_conntrack_tcp.h"""
_ECHO_ANSWER, _ECHO_REQUEST = 0, 8

_TRANSITORY_S, _IDLE_S = 240, 7440
"""RFC 5382, section 5: 4 minutes for a connection that isn't established, and 2 h 4 min for an idle
one. From the first packet on the kernel's own timeouts count. Its 5 days are too long to begin
with: what was about to close at the other anchor, which nobody has told us, would stay that long.
"""
_TIMEOUT_SYSCTLS = {
    (TCP, True): "tcp_timeout_established",
    (UDP, True): "udp_timeout_stream",
    (UDP, False): "udp_timeout",
    (ICMP, True): "icmp_timeout",
    (ICMP, False): "icmp_timeout",
}
"""By protocol and whether the flow is established."""


def entries(
    sessions: Mapping[FlowKey, Nat], forwarded: Collection[FlowKey] = ()
) -> Iterator[Message]:
    """Requests that make the sessions' entries; one that is there already is refused (EEXIST).

    Those that are `forwarded` were opened from outside.
    """
    states = {
        (protocol, established): _state(protocol, established=bool(established))
        for protocol in (TCP, UDP, ICMP)
        for established in (0, ESTABLISHED)
    }
    for key, nat in sessions.items():
        protocol = key[PROTOCOL_OFFSET]
        if key in forwarded:
            opened = _forwarded(key, nat)
        else:
            tuples = _echo_tuples(key) if protocol == ICMP else _port_tuples(key)
            opened = tuples + _nat(_NAT_SOURCE, nat[NAT_ADDRESS], nat[TRANSLATION][4:])
        body = _NFGEN_IPV4 + opened + states[protocol, nat[STATE] & ESTABLISHED]
        yield Message(_NEW, NLM_F_CREATE | NLM_F_EXCL, body, "adopting a flow")


def loosenings(keys: Iterable[FlowKey]) -> Iterator[Message]:
    """Requests for entries that are there, of connections that are or were elsewhere, too.

    What such an entry remembers of the windows is out of date, or soon will be.
    """
    liberal = _of_tcp(_liberal())
    for key in keys:
        if key[PROTOCOL_OFFSET] == TCP:
            yield Message(_NEW, 0, _NFGEN_IPV4 + _port_tuples(key) + liberal, "loosening a flow")


def _port_tuples(key: FlowKey) -> bytes:
    client, remote, protocol, port, remote_port = key[:4], key[4:8], key[8], key[9:11], key[11:]
    return _port_tuple(_ORIGINAL, protocol, client, remote, port, remote_port) + _port_tuple(
        _REPLY, protocol, remote, client, remote_port, port
    )


def _forwarded(key: FlowKey, nat: Nat) -> bytes:
    """Tuples and translation of a flow that was opened from outside."""
    client, remote, protocol, port, remote_port = key[:4], key[4:8], key[8], key[9:11], key[11:]
    address, nat_port = nat[NAT_ADDRESS], nat[TRANSLATION][4:]
    return (
        _port_tuple(_ORIGINAL, protocol, remote, address, remote_port, nat_port)
        + _port_tuple(_REPLY, protocol, address, remote, nat_port, remote_port)
        + _nat(_NAT_DESTINATION, client, port)
    )


def _port_tuple(
    number: int, protocol: int, source: bytes, destination: bytes, port: bytes, to_port: bytes
) -> bytes:
    return _PORT_TUPLE.pack(
        52, number | _NESTED,
        20, 1 | _NESTED, 8, 1, source, 8, 2, destination,
        28, 2 | _NESTED, 5, 1, protocol, 6, 2, port, 6, 3, to_port,
    )  # fmt: skip


def _echo_tuples(key: FlowKey) -> bytes:
    client, remote, identifier = key[:4], key[4:8], key[9:11]
    return _echo_tuple(_ORIGINAL, client, remote, identifier, _ECHO_REQUEST) + _echo_tuple(
        _REPLY, remote, client, identifier, _ECHO_ANSWER
    )


def _echo_tuple(
    number: int, source: bytes, destination: bytes, identifier: bytes, type_: int
) -> bytes:
    return _ECHO_TUPLE.pack(
        60, number | _NESTED,
        20, 1 | _NESTED, 8, 1, source, 8, 2, destination,
        36, 2 | _NESTED, 5, 1, ICMP, 6, 4, identifier, 5, 5, type_, 5, 6, 0,
    )  # fmt: skip


def _nat(side: int, address: bytes, port: bytes) -> bytes:
    """What becomes of source or destination: address, and port or identifier."""
    return _NAT.pack(
        40, side | _NESTED,
        8, 1, address, 8, 2, address,
        20, 3 | _NESTED, 6, 1, port, 6, 2, port,
    )  # fmt: skip


def _state(protocol: int, *, established: bool) -> bytes:
    """Status, timeout and state of an entry."""
    status = _CONFIRMED
    if established:
        status |= _SEEN_REPLY | _ASSURED
    elif protocol == TCP:
        status |= _SEEN_REPLY
    timeout = _timeout(protocol, established=established)
    state = attribute(_STATUS, status.to_bytes(4, "big"))
    state += attribute(_TIMEOUT, timeout.to_bytes(4, "big"))
    return state + (_tcp_state(established=established) if protocol == TCP else b"")


def _tcp_state(*, established: bool) -> bytes:
    state = attribute(_TCP_STATE, bytes([_TCP_ESTABLISHED if established else _SYN_RECV]))
    return _of_tcp(state + _liberal())


def _liberal() -> bytes:
    """In both directions: flags and their mask (struct nf_ct_tcp_flags)."""
    flags = bytes([_BE_LIBERAL, _BE_LIBERAL])
    return attribute(_TCP_FLAGS_ORIGINAL, flags) + attribute(_TCP_FLAGS_REPLY, flags)


def _of_tcp(state: bytes) -> bytes:
    return attribute(_PROTOINFO | _NESTED, attribute(_PROTOINFO_TCP | _NESTED, state))


def _timeout(protocol: int, *, established: bool) -> int:
    """In seconds."""
    name = _TIMEOUT_SYSCTLS.get((protocol, established))
    if name is None:
        return _TRANSITORY_S
    value = sysctl.read(("net", "netfilter", f"nf_conntrack_{name}"))
    return _IDLE_S if value is None else min(value, _IDLE_S)
