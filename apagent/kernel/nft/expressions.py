"""nftables rule expressions, as the attribute trees that pyroute2's rule codec packs.

A rule is a list of expressions that load into registers, compare, look up and act. The functions
here are named after the nft words that they stand for; each returns what those words compile to
(`nft --debug=netlink` prints the same). Constants: linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv4Network
from typing import Any

Expression = dict[str, Any]
Expressions = tuple[Expression, ...]

SOURCE_ADDRESS, DESTINATION_ADDRESS = 12, 16
"""Offsets in the IPv4 header (RFC 791, section 3.1)."""
SOURCE_PORT, DESTINATION_PORT, ECHO_ID = 0, 2, 4
"""Offsets in the transport header (RFC 9293, RFC 768, RFC 792)."""
_ICMP_TYPE, _TCP_FLAGS = 0, 13
_TTL, _PROTOCOL, _HEADER_CHECKSUM = 8, 9, 10
_ETHER_SOURCE = 6
_INNER = 8
"""Where the packet that an ICMP error speaks of begins in the error (RFC 792)."""
_INNER_PORTS = _INNER + 20
"""Its transport header, if its IPv4 header has no options."""
_CHECKSUM_INET = 1
_ICMP_ECHO_REQUEST = 8
FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10
_TCP_OPTION_MSS, _MSS_OFFSET, _MSS_LENGTH = 2, 2, 2

_REG32 = 8
"""NFT_REG32_00: the first of sixteen 4-byte data registers."""
_VERDICT_REGISTER = 0
_LINK_HEADER, _NETWORK_HEADER, _TRANSPORT_HEADER = 0, 1, 2
_EQ, _NEQ, _LT, _GT = 0, 1, 2, 4
_META_PRIORITY, _META_MARK, _META_IIFNAME, _META_OIFNAME = 2, 3, 6, 7
_META_IIFTYPE, _META_NFPROTO, _META_L4PROTO = 8, 15, 16
_ARPHRD_ETHER = 1
_NFPROTO_IPV4 = 2
_TCP = 6
_CT_STATE_ESTABLISHED = 0x02 | 0x04
"""Established, or related to a flow that is."""
_CT_STATE, _CT_STATE_INVALID, _CT_STATE_NEW, _CT_ZONE, _CT_EVENT_MASK = 0, 0x01, 0x08, 17, 18
_EVENTS = 1 << 0 | 1 << 2 | 1 << 4
"""IPCT_NEW, _DESTROY and _ASSURED (linux/netfilter/nf_conntrack_common.h)."""
_ORIGINAL = 0
_EXTHDR_TCPOPT = 1
_LIMIT_PACKETS = 0
_NAT_SNAT, _NAT_DNAT = 0, 1
_NAT_RANGE_PORTS = "NF_NAT_RANGE_PROTO_SPECIFIED"
_FIB_DADDR, _FIB_ADDRESS_TYPE = 2, ("NFT_FIB_RESULT_UNSPEC", "NFT_FIB_RESULT_OIF")
"""NFTA_FIB_F_DADDR; NFT_FIB_RESULT_ADDRTYPE is 3, which pyroute2, taking results for flags, packs
for bits 0 and 1."""
_RTN_UNICAST, _RTN_LOCAL = 1, 2
_DYNSET_UPDATE, _DYNSET_DELETE = 1, 2
_OBJECT_COUNTER = 1
_REJECT_TCP_RESET = 1
_INTERFACE_NAME_SIZE = 16

_NF_DROP, _NF_ACCEPT, _JUMP, _GOTO, _RETURN = 0, 1, -3, -4, -5

_U32 = struct.Struct("=I")


def _expression(name: str, *attributes: tuple[str, Any]) -> Expression:
    prefix = f"NFTA_{name.upper()}_"
    attrs = [(prefix + key, value) for key, value in attributes]
    return {"attrs": [("NFTA_EXPR_NAME", name), ("NFTA_EXPR_DATA", {"attrs": attrs})]}


def _value(data: bytes) -> dict[str, Any]:
    return {"attrs": [("NFTA_DATA_VALUE", data)]}


def _register(slot: int) -> int:
    return _REG32 + slot


def _meta(key: int, slot: int = 0) -> Expression:
    return _expression("meta", ("KEY", key), ("DREG", _register(slot)))


def _payload(base: int, offset: int, length: int, slot: int = 0) -> Expression:
    return _expression(
        "payload",
        ("DREG", _register(slot)),
        ("BASE", base),
        ("OFFSET", offset),
        ("LEN", length),
    )


def _compare(data: bytes, operator: int = _EQ) -> Expression:
    return _expression("cmp", ("SREG", _register(0)), ("OP", operator), ("DATA", _value(data)))


def _mask(mask: bytes, xor: bytes) -> Expression:
    return _expression(
        "bitwise",
        ("SREG", _register(0)),
        ("DREG", _register(0)),
        ("LEN", len(mask)),
        ("MASK", _value(mask)),
        ("XOR", _value(xor)),
    )


def _immediate(data: bytes, slot: int = 0) -> Expression:
    return _expression("immediate", ("DREG", _register(slot)), ("DATA", _value(data)))


def verdict(code: int, chain: str = "") -> dict[str, Any]:
    """A verdict as immediate data or as a map's value."""
    attrs: list[tuple[str, Any]] = [("NFTA_VERDICT_CODE", code)]
    if chain:
        attrs.append(("NFTA_VERDICT_CHAIN", chain))
    return {"attrs": [("NFTA_DATA_VERDICT", {"attrs": attrs})]}


def goto_data(chain: str) -> dict[str, Any]:
    """`goto chain` as a map's value."""
    return verdict(_GOTO, chain)


def jump_data(chain: str) -> dict[str, Any]:
    """`jump chain` as a map's value."""
    return verdict(_JUMP, chain)


def _verdict_rule(code: int, chain: str = "") -> Expressions:
    data = verdict(code, chain)
    return (_expression("immediate", ("DREG", _VERDICT_REGISTER), ("DATA", data)),)


def accept() -> Expressions:
    """`accept`."""
    return _verdict_rule(_NF_ACCEPT)


def drop() -> Expressions:
    """`drop`."""
    return _verdict_rule(_NF_DROP)


def return_() -> Expressions:
    """`return`."""
    return _verdict_rule(_RETURN)


def jump(chain: str) -> Expressions:
    """`jump chain`."""
    return _verdict_rule(_JUMP, chain)


def goto(chain: str) -> Expressions:
    """`goto chain`: without a way back, so that no other rule here looks at the packet."""
    return _verdict_rule(_GOTO, chain)


def interface_name(name: str) -> bytes:
    """An interface name as the kernel compares it: padded to 16 bytes."""
    return name.encode().ljust(_INTERFACE_NAME_SIZE, b"\0")


def iifname(name: str) -> Expressions:
    """`iifname "name"`."""
    return (_meta(_META_IIFNAME), _compare(interface_name(name)))


def iifname_begins(prefix: str) -> Expressions:
    """`iifname "prefix*"`."""
    return (_meta(_META_IIFNAME), _compare(prefix.encode()))


def oifname(name: str) -> Expressions:
    """`oifname "name"`."""
    return (_meta(_META_OIFNAME), _compare(interface_name(name)))


def ipv4() -> Expressions:
    """`meta nfproto ipv4`; nft takes it in when it prints an `ip …` match that follows."""
    return (_meta(_META_NFPROTO), _compare(bytes([_NFPROTO_IPV4])))


def l4proto(protocol: int, *, negate: bool = False) -> Expressions:
    """`meta l4proto [!=] protocol`."""
    operator = _NEQ if negate else _EQ
    return (_meta(_META_L4PROTO), _compare(bytes([protocol]), operator))


def address_is(offset: int, address: IPv4Address, *, negate: bool = False) -> Expressions:
    """`ip saddr|daddr [!=] address`; `offset` says which."""
    return (
        *ipv4(),
        _payload(_NETWORK_HEADER, offset, 4),
        _compare(address.packed, _NEQ if negate else _EQ),
    )


def in_prefix(offset: int, prefix: IPv4Network, *, negate: bool = False) -> Expressions:
    """`ip saddr|daddr [!=] prefix`; `offset` says which address."""
    operator = _NEQ if negate else _EQ
    network = prefix.network_address.packed
    whole_bytes, rest = divmod(prefix.prefixlen, 8)
    if rest or not whole_bytes:
        return (
            *ipv4(),
            _payload(_NETWORK_HEADER, offset, 4),
            _mask(prefix.netmask.packed, bytes(4)),
            _compare(network, operator),
        )
    return (
        *ipv4(),
        _payload(_NETWORK_HEADER, offset, whole_bytes),
        _compare(network[:whole_bytes], operator),
    )


def ct_state_new() -> Expressions:
    """`ct state new`."""
    return (
        _expression("ct", ("KEY", _CT_STATE), ("DREG", _register(0))),
        _mask(_U32.pack(_CT_STATE_NEW), bytes(4)),
        _compare(bytes(4), _NEQ),
    )


def ct_state_opening() -> Expressions:
    """`ct state invalid,new`: seen by conntrack, and of no flow that it knows."""
    return (
        _expression("ct", ("KEY", _CT_STATE), ("DREG", _register(0))),
        _mask(_U32.pack(_CT_STATE_INVALID | _CT_STATE_NEW), bytes(4)),
        _compare(bytes(4), _NEQ),
    )


def ct_state_established() -> Expressions:
    """`ct state established,related`."""
    return (
        _expression("ct", ("KEY", _CT_STATE), ("DREG", _register(0))),
        _mask(_U32.pack(_CT_STATE_ESTABLISHED), bytes(4)),
        _compare(bytes(4), _NEQ),
    )


def ct_state_invalid() -> Expressions:
    """`ct state invalid`."""
    return (
        _expression("ct", ("KEY", _CT_STATE), ("DREG", _register(0))),
        _mask(_U32.pack(_CT_STATE_INVALID), bytes(4)),
        _compare(bytes(4), _NEQ),
    )


def ct_original_zone(zone: int) -> Expressions:
    """`ct original zone zone`."""
    return (
        _expression("ct", ("KEY", _CT_ZONE), ("DREG", _register(0)), ("DIRECTION", _ORIGINAL)),
        _compare(struct.pack("=H", zone)),
    )


def set_original_zone(zone: int) -> Expressions:
    """`ct original zone set zone`: replies are found without a zone, by their translation."""
    return (
        _immediate(struct.pack("=H", zone)),
        _expression("ct", ("KEY", _CT_ZONE), ("DIRECTION", _ORIGINAL), ("SREG", _register(0))),
    )


def set_events() -> Expressions:
    """`ct event set new,destroy,assured`: what conntrack reports of the flow, to anybody."""
    return (
        _immediate(_U32.pack(_EVENTS)),
        _expression("ct", ("KEY", _CT_EVENT_MASK), ("SREG", _register(0))),
    )


def tcp_flags(mask: int, value: int, *, negate: bool = False) -> Expressions:
    """`tcp flags & mask ==|!= value`; `l4proto(TCP)` has to come before."""
    return (
        _payload(_TRANSPORT_HEADER, _TCP_FLAGS, 1),
        _mask(bytes([mask]), bytes(1)),
        _compare(bytes([value]), _NEQ if negate else _EQ),
    )


def not_first_of_tcp() -> Expressions:
    """`tcp flags != syn / fin,syn,rst,ack`: a segment that can't open a connection."""
    return (*l4proto(_TCP), *tcp_flags(FIN | SYN | RST | ACK, SYN, negate=True))


def icmp_echo_request(*, negate: bool = False) -> Expressions:
    """`icmp type [!=] echo-request`; `l4proto(ICMP)` has to come before."""
    return (
        _payload(_TRANSPORT_HEADER, _ICMP_TYPE, 1),
        _compare(bytes([_ICMP_ECHO_REQUEST]), _NEQ if negate else _EQ),
    )


def ttl_above(limit: int) -> Expressions:
    """`ip ttl > limit`."""
    return (*ipv4(), _payload(_NETWORK_HEADER, _TTL, 1), _compare(bytes([limit]), _GT))


def ttl_below(limit: int) -> Expressions:
    """`ip ttl < limit`."""
    return (*ipv4(), _payload(_NETWORK_HEADER, _TTL, 1), _compare(bytes([limit]), _LT))


def set_ttl(ttl: int) -> Expressions:
    """`ip ttl set ttl`: written with the byte beside it, as the checksum counts in pairs."""
    return (
        _payload(_NETWORK_HEADER, _TTL, 2),
        _mask(b"\x00\xff", bytes([ttl, 0])),
        _expression(
            "payload",
            ("SREG", _register(0)),
            ("BASE", _NETWORK_HEADER),
            ("OFFSET", _TTL),
            ("LEN", 2),
            ("CSUM_TYPE", _CHECKSUM_INET),
            ("CSUM_OFFSET", _HEADER_CHECKSUM),
        ),
    )


def client_address() -> Expressions:
    """`ip saddr` as the first field of a key."""
    return (_payload(_NETWORK_HEADER, SOURCE_ADDRESS, 4, 0),)


def destination_address() -> Expressions:
    """`ip daddr` as a key."""
    return (*ipv4(), _payload(_NETWORK_HEADER, DESTINATION_ADDRESS, 4, 0))


def client_pair() -> Expressions:
    """`ip saddr . ether saddr` as a key."""
    return (
        *ipv4(),
        _meta(_META_IIFTYPE),
        _compare(struct.pack("=H", _ARPHRD_ETHER)),
        *client_address(),
        _payload(_LINK_HEADER, _ETHER_SOURCE, 6, 1),
    )


def client_socket() -> Expressions:
    """`ip saddr . meta l4proto . th sport` as a key."""
    return (
        *client_address(),
        _meta(_META_L4PROTO, 1),
        _payload(_TRANSPORT_HEADER, SOURCE_PORT, 2, 2),
    )


def flow_of_client_error() -> Expressions:
    """The key of the flow that an ICMP error from a client speaks of.

    The embedded packet is one that the client received, so its addresses and ports are the other
    way round. nft has no words for an embedded header but raw payload (`@th,192,32 . …`).
    """
    return (
        _payload(_TRANSPORT_HEADER, _INNER + DESTINATION_ADDRESS, 4, 0),
        _payload(_TRANSPORT_HEADER, _INNER + SOURCE_ADDRESS, 4, 1),
        _payload(_TRANSPORT_HEADER, _INNER + _PROTOCOL, 1, 2),
        _payload(_TRANSPORT_HEADER, _INNER_PORTS + DESTINATION_PORT, 2, 3),
        _payload(_TRANSPORT_HEADER, _INNER_PORTS + SOURCE_PORT, 2, 4),
    )


def client_echo() -> Expressions:
    """`ip saddr . ip daddr . icmp id` as a key."""
    return (
        *client_address(),
        _payload(_NETWORK_HEADER, DESTINATION_ADDRESS, 4, 1),
        _payload(_TRANSPORT_HEADER, ECHO_ID, 2, 2),
    )


def client_flow() -> Expressions:
    """`ip saddr . ip daddr . meta l4proto . th sport . th dport` as a key."""
    return (
        *client_address(),
        _payload(_NETWORK_HEADER, DESTINATION_ADDRESS, 4, 1),
        _meta(_META_L4PROTO, 2),
        _payload(_TRANSPORT_HEADER, SOURCE_PORT, 2, 3),
        _payload(_TRANSPORT_HEADER, DESTINATION_PORT, 2, 4),
    )


def in_set(name: str, *, negate: bool = False) -> Expressions:
    """`[!=] @name`, of the key that is loaded."""
    flags = [("FLAGS", ["NFT_LOOKUP_F_INV"])] if negate else []
    return (_expression("lookup", ("SET", name), ("SREG", _register(0)), *flags),)


def iifname_in(name: str) -> Expressions:
    """`iifname @name`."""
    return (_meta(_META_IIFNAME), *in_set(name))


def _lookup(name: str) -> Expression:
    """Replace the key that is loaded by the map's value; ends the rule if it isn't in."""
    return _expression("lookup", ("SET", name), ("SREG", _register(0)), ("DREG", _register(0)))


def priority_from(name: str) -> Expressions:
    """`meta priority set … map @name`, of the key that is loaded; ends the rule if it isn't in."""
    return (
        _lookup(name),
        _expression("meta", ("KEY", _META_PRIORITY), ("SREG", _register(0))),
    )


def set_priority(value: int) -> Expressions:
    """`meta priority set value`."""
    set_ = _expression("meta", ("KEY", _META_PRIORITY), ("SREG", _register(0)))
    return (_immediate(_U32.pack(value)), set_)


def priority_is(value: bytes, *, negate: bool = False) -> Expressions:
    """`meta priority [!=] value`."""
    return (_meta(_META_PRIORITY), _compare(value, _NEQ if negate else _EQ))


def verdict_from(name: str) -> Expressions:
    """`vmap @name`, of the key that is loaded."""
    return (
        _expression("lookup", ("SET", name), ("SREG", _register(0)), ("DREG", _VERDICT_REGISTER)),
    )


def priority_verdict(name: str) -> Expressions:
    """`meta priority vmap @name`."""
    return (_meta(_META_PRIORITY), *verdict_from(name))


def sender_verdict(name: str) -> Expressions:
    """`ether saddr vmap @name`."""
    return (
        _meta(_META_IIFTYPE),
        _compare(struct.pack("=H", _ARPHRD_ETHER)),
        _payload(_LINK_HEADER, _ETHER_SOURCE, 6),
        *verdict_from(name),
    )


def update_map(name: str, value: bytes) -> Expressions:
    """`update @name { key : value }`, of the key that is loaded: add it, or begin its life anew.

    An element that is there keeps its value.
    """
    return _change_map(name, _DYNSET_UPDATE, value)


def delete_from_map(name: str, value: bytes) -> Expressions:
    """`delete @name { key : value }`, of the key that is loaded, whatever its value is."""
    return _change_map(name, _DYNSET_DELETE, value)


def _change_map(name: str, operation: int, value: bytes) -> Expressions:
    return (
        _immediate(value, 1),
        _expression(
            "dynset",
            ("SET_NAME", name),
            ("OP", operation),
            ("SREG_KEY", _register(0)),
            ("SREG_DATA", _register(1)),
        ),
    )


def delete_from_set(name: str) -> Expressions:
    """`delete @name { key }`, of the key that is loaded."""
    return (
        _expression(
            "dynset", ("SET_NAME", name), ("OP", _DYNSET_DELETE), ("SREG_KEY", _register(0))
        ),
    )


def set_mark(value: int, mask: int) -> Expressions:
    """`meta mark set meta mark & ~mask | value`."""
    return (
        _meta(_META_MARK),
        _mask(_U32.pack(~mask & 0xFFFFFFFF), _U32.pack(value)),
        _expression("meta", ("KEY", _META_MARK), ("SREG", _register(0))),
    )


def marked() -> Expressions:
    """`meta mark != 0`."""
    return (_meta(_META_MARK), _compare(bytes(4), _NEQ))


def clear_mark() -> Expressions:
    """`meta mark set 0`."""
    set_ = _expression("meta", ("KEY", _META_MARK), ("SREG", _register(0)))
    return (_immediate(bytes(4)), set_)


def notrack() -> Expressions:
    """`notrack`."""
    return ({"attrs": [("NFTA_EXPR_NAME", "notrack")]},)


def set_mss(size: int) -> Expressions:
    """`tcp option maxseg size set size`; the kernel only ever lowers it (nft_exthdr.c)."""
    return (
        _immediate(struct.pack(">H", size)),
        _expression(
            "exthdr",
            ("SREG", _register(0)),
            ("TYPE", _TCP_OPTION_MSS),
            ("OFFSET", _MSS_OFFSET),
            ("LEN", _MSS_LENGTH),
            ("OP", _EXTHDR_TCPOPT),
        ),
    )


def limit_per_second(rate: int, burst: int) -> Expressions:
    """`limit rate rate/second burst burst packets`."""
    return (
        _expression(
            "limit",
            ("RATE", rate),
            ("UNIT", 1),
            ("BURST", burst),
            ("TYPE", _LIMIT_PACKETS),
            ("FLAGS", 0),
        ),
    )


def log(group: int, snaplen: int) -> Expressions:
    """`log group group snaplen snaplen` (nflog)."""
    return (_expression("log", ("GROUP", group), ("SNAPLEN", snaplen)),)


def counter(name: str) -> Expressions:
    """`counter name "name"`."""
    return (_expression("objref", ("IMM_TYPE", _OBJECT_COUNTER), ("IMM_NAME", name)),)


def reject_with_reset() -> Expressions:
    """`reject with tcp reset`; `l4proto(TCP)` has to come before."""
    return (_expression("reject", ("TYPE", _REJECT_TCP_RESET), ("ICMP_CODE", 0)),)


def masquerade() -> Expressions:
    """`masquerade`."""
    return (_expression("masq"),)


def snat(address: IPv4Address) -> Expressions:
    """`snat ip to address`."""
    return (_immediate(address.packed), _snat())


def snat_from(name: str) -> Expressions:
    """`snat ip to oifname map @name`; ends the rule if the interface isn't in."""
    return (_meta(_META_OIFNAME), _lookup(name), _snat())


def _snat() -> Expression:
    return _expression(
        "nat",
        ("TYPE", _NAT_SNAT),
        ("FAMILY", _NFPROTO_IPV4),
        ("REG_ADDR_MIN", _register(0)),
    )


def to_local_address() -> Expressions:
    """`fib daddr type local`."""
    return _address_type(_RTN_LOCAL, _EQ)


def to_unicast_address(*, negate: bool = False) -> Expressions:
    """`fib daddr type [!=] unicast`: another host's address, with or without a route to it."""
    return _address_type(_RTN_UNICAST, _NEQ if negate else _EQ)


def _address_type(type_: int, operator: int) -> Expressions:
    return (
        _expression(
            "fib",
            ("DREG", _register(0)),
            ("RESULT", list(_FIB_ADDRESS_TYPE)),
            ("FLAGS", _FIB_DADDR),
        ),
        _compare(_U32.pack(type_), operator),
    )


def destination_port(port: int) -> Expressions:
    """`th dport port`; `l4proto` has to come before."""
    return (
        _payload(_TRANSPORT_HEADER, DESTINATION_PORT, 2),
        _compare(struct.pack(">H", port)),
    )


def dnat(address: IPv4Address, port: int) -> Expressions:
    """`dnat ip to address:port`."""
    return (_immediate(address.packed), _immediate(struct.pack(">H", port), 1), _dnat())


def dnat_from(name: str) -> Expressions:
    """`dnat ip to ip daddr . meta l4proto . th dport map @name`; ends the rule if it isn't in."""
    return (
        *destination_address(),
        _meta(_META_L4PROTO, 1),
        _payload(_TRANSPORT_HEADER, DESTINATION_PORT, 2, 2),
        _lookup(name),
        _dnat(),
    )


def _dnat() -> Expression:
    return _expression(
        "nat",
        ("TYPE", _NAT_DNAT),
        ("FAMILY", _NFPROTO_IPV4),
        ("REG_ADDR_MIN", _register(0)),
        ("REG_PROTO_MIN", _register(1)),
        ("FLAGS", [_NAT_RANGE_PORTS]),
    )
