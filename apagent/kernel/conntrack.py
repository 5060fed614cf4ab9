"""Conntrack, reduced to the flows that we translate: events and dumps of ctnetlink.

Conntrack is the only clock of a session, so the order of its reports matters. What we rely on
(net/netfilter/nf_conntrack_core.c): an entry is reported as new when it is confirmed, with its
translation in place, and as destroyed before it leaves the hash table; an entry of the same tuple
can't be confirmed until then. So DESTROY of an old entry precedes NEW of one like it, and the last
report on a flow in a batch is the truth. Unconfirmed entries are never reported or dumped.

An entry reports its end only if events were wanted when it was made. With the sysctl
net.netfilter.nf_conntrack_events at 1 they always are; with 2, its default, only while somebody
listens, so that flows from before our start, or from while we were down, would end in silence.

In a network with takeover we also listen to updates, for the one that says that a flow is
established. Our nftables rules keep the kernel from sending the others (`forwarding.forward`), and
a filter keeps away those of other networks. A dying entry is not updated
(nf_ct_deliver_cached_events(), nf_conntrack_ecache.c), so that none comes after the end.
"""

from __future__ import annotations

import contextlib
import errno
import struct
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from typing import NamedTuple

from apagent.core.domain import Network
from apagent.core.events import FlowsChanged
from apagent.core.model import (
    ESTABLISHED,
    ICMP,
    NAT_ADDRESS,
    TCP,
    TRANSLATION,
    UDP,
    Flow,
    FlowKey,
    Nat,
    NetworkName,
    Sessions,
)
from apagent.errors import EventsLost, KernelFault
from apagent.kernel import adoption
from apagent.kernel.conntrack_filter import wanted_events
from apagent.kernel.datagrams import BatchReceiver
from apagent.kernel.port_flows import Changes, PortFlowReader
from apagent.kernel.wire import (
    NLM_F_DUMP,
    Message,
    Netlink,
    attribute,
    attributes,
    split,
)

BATCHES_PER_READ, EVENTS_PER_BATCH = 128, 128
"""Bounds one `read` to some tenths of a second, so that the event loop breathes."""
WANTED_BUFFER = 8 << 20
"""Bytes of socket buffer for events, room for some ten thousand."""

_NETLINK_NETFILTER = 12
_GROUP_NEW, _GROUP_UPDATE, _GROUP_DESTROY = 1, 2, 3
"""NFNLGRP_CONNTRACK_NEW, _UPDATE and _DESTROY (linux/netfilter/nfnetlink.h)."""
_CTNETLINK = 1 << 8
_GET, _DELETE = _CTNETLINK | 1, _CTNETLINK | 2
"""IPCTNL_MSG_CT_GET and _DELETE."""
_NFGEN_IPV4 = b"\x02\0\0\0"
"""struct nfgenmsg: AF_INET."""
_NFGEN_NONE = b"\x07\0\0\0"
"""struct nfgenmsg: AF_BRIDGE, which no entry is of."""

_TUPLE_ORIGINAL, _TUPLE_REPLY = 1, 2
_TUPLE_IP, _TUPLE_PROTOCOL, _TUPLE_ZONE = 1, 2, 3
_IP_SOURCE, _IP_DESTINATION = 1, 2
_NUMBER, _SOURCE_PORT, _DESTINATION_PORT, _ICMP_ID, _ICMP_TYPE, _ICMP_CODE = 1, 2, 3, 4, 5, 6
"""Attributes (linux/netfilter/nfnetlink_conntrack.h)."""
_NESTED = 0x8000
_ATTRIBUTE = struct.Struct("=HH")
_IPV4_SIZE = 4
_ECHO_REQUEST = b"\x08"
_NO_PORT = b"\0\0"
_UNKNOWN_GENERATION = bytes(4)
"""Under which claim a flow was opened, the engine knows, not the kernel."""
_STATUS, _ASSURED = 3, 0x04
"""CTA_STATUS; IPS_ASSURED (linux/netfilter/nf_conntrack_common.h)."""

_ICMP_NUMBER = bytes([ICMP])
_PORT_PROTOCOLS = {bytes([TCP]), bytes([UDP])}
_EVENT_SIZE = 2048
"""Bytes for an event; one takes some hundred."""
_GONE = frozenset({errno.ENOENT})
_ADOPTIONS = 3
"""A packet may make another entry between the end of one and the adoption of the next."""
_MAX_DRAINED = 1 << 18
"""More events than the wanted buffer holds."""

_PORT_TUPLE = "12s4s4s4s8s1s3x4s2s2x4s2s2x"
"""A tuple of TCP or UDP over IPv4 as the kernel lays it out: five runs of attribute headers with
source, destination, protocol and ports between."""
_PORT_TUPLES = struct.Struct("=" + _PORT_TUPLE + _PORT_TUPLE)


def _header(length: int, type_: int) -> bytes:
    return _ATTRIBUTE.pack(length, type_)


def _port_tuple_headers(tuple_: int) -> tuple[bytes, ...]:
    return (
        _header(52, tuple_ | _NESTED) + _header(20, _TUPLE_IP | _NESTED) + _header(8, _IP_SOURCE),
        _header(8, _IP_DESTINATION),
        _header(28, _TUPLE_PROTOCOL | _NESTED) + _header(5, _NUMBER),
        _header(6, _SOURCE_PORT),
        _header(6, _DESTINATION_PORT),
    )


_PORT_HEADERS = _port_tuple_headers(_TUPLE_ORIGINAL) + _port_tuple_headers(_TUPLE_REPLY)


class OurFlow(NamedTuple):
    """A translated flow of one of our networks."""

    network: NetworkName
    key: FlowKey
    nat: Nat


class Tuples(NamedTuple):
    """What counts of an entry's two tuples; for an echo a port is the identifier.

    Source and destination of the original direction, then destination and source of the reply.
    """

    source: bytes
    source_port: bytes
    destination: bytes
    destination_port: bytes
    protocol: bytes
    reply_destination: bytes
    reply_destination_port: bytes
    reply_source: bytes
    reply_source_port: bytes
    zone: int = 0
    """Of the original direction."""

    def reversed(self) -> Tuples:
        """As the reply's sender has it, who is a client if a port is forwarded to it."""
        return Tuples(
            self.reply_source,
            self.reply_source_port,
            self.source,
            self.source_port,
            self.protocol,
            self.destination,
            self.destination_port,
            self.source,
            self.source_port,
            self.zone,
        )


class FlowParser:
    """Picks from ctnetlink messages the flows of some networks that are translated.

    Either a client opened the flow, and replies come to another address or port than its own. Or
    the flow was opened to a forwarded port, and replies come from a client instead of from there.
    The flow's key is what the client sends.
    """

    def __init__(self, networks: Sequence[Network]) -> None:
        self._prefixes = [
            (n.zone, int(n.prefix.network_address), int(n.prefix.netmask), n.name) for n in networks
        ]
        self._with_status = {n.name for n in networks if n.takeover}

    def parse(self, body: bytes) -> OurFlow | None:
        """The flow in a message (without netlink header); None: it isn't one of ours."""
        tuples = port_tuples(body) or any_tuples(body)
        if tuples is None:
            return None
        network = self._network_of(tuples.source, tuples.zone)
        if network is None:
            tuples = tuples.reversed()
            network = self._network_of(tuples.source, tuples.zone)
        client, client_port, remote, remote_port, protocol, nat, nat_port = tuples[:7]
        if network is None or (nat == client and nat_port == client_port):
            return None
        key = client + remote + protocol + client_port + remote_port
        established = network in self._with_status and is_assured(body)
        flags = bytes([ESTABLISHED if established else 0])
        return OurFlow(network, FlowKey(key), Nat(nat + nat_port + _UNKNOWN_GENERATION + flags))

    def _network_of(self, client: bytes, zone: int) -> NetworkName | None:
        address = int.from_bytes(client, "big")
        for its_zone, network, mask, name in self._prefixes:
            if address & mask == network and zone == its_zone:
                return name
        return None


def port_tuples(body: bytes) -> Tuples | None:
    """The tuples of TCP or UDP over IPv4 in the layout that the kernel gives them.

    None: another protocol or another layout, which is for `any_tuples`.
    """
    if len(body) < len(_NFGEN_IPV4) + _PORT_TUPLES.size:
        return None
    fields = _PORT_TUPLES.unpack_from(body, len(_NFGEN_IPV4))
    if fields[::2] != _PORT_HEADERS:
        return None
    source, destination, protocol, port, to_port, inside, nat, _, inside_port, nat_port = fields[
        1::2
    ]
    if protocol not in _PORT_PROTOCOLS:
        return None
    return Tuples(source, port, destination, to_port, protocol, nat, nat_port, inside, inside_port)


def any_tuples(body: bytes) -> Tuples | None:
    """The tuples of TCP, UDP or ICMP echo over IPv4 in any layout; None: another protocol."""
    tuples = dict(attributes(body, len(_NFGEN_IPV4)))
    if _TUPLE_ORIGINAL not in tuples or _TUPLE_REPLY not in tuples:
        return None
    addresses, ports = _parts(tuples[_TUPLE_ORIGINAL])
    outside, outside_ports = _parts(tuples[_TUPLE_REPLY])
    client = addresses.get(_IP_SOURCE, b"")
    protocol = ports.get(_NUMBER, b"")
    if len(client) != _IPV4_SIZE:
        return None
    if protocol in _PORT_PROTOCOLS:
        port, remote_port = ports[_SOURCE_PORT], ports[_DESTINATION_PORT]
        inside_port, nat_port = outside_ports[_SOURCE_PORT], outside_ports[_DESTINATION_PORT]
    elif protocol == _ICMP_NUMBER and ports[_ICMP_TYPE] == _ECHO_REQUEST:
        port, remote_port, nat_port = ports[_ICMP_ID], _NO_PORT, outside_ports[_ICMP_ID]
        inside_port = _NO_PORT
    else:
        return None
    remote, nat, inside = addresses[_IP_DESTINATION], outside[_IP_DESTINATION], outside[_IP_SOURCE]
    zone = int.from_bytes(dict(attributes(tuples[_TUPLE_ORIGINAL])).get(_TUPLE_ZONE, b""), "big")
    return Tuples(
        client, port, remote, remote_port, protocol, nat, nat_port, inside, inside_port, zone
    )


def is_assured(body: bytes) -> bool:
    """Whether the entry has seen packets of both directions."""
    status = dict(attributes(body, len(_NFGEN_IPV4))).get(_STATUS, b"\0")
    return bool(status[-1] & _ASSURED)


def _parts(payload: bytes) -> tuple[dict[int, bytes], dict[int, bytes]]:
    """A tuple's addresses and its protocol's fields."""
    parts = dict(attributes(payload))
    return dict(attributes(parts[_TUPLE_IP])), dict(attributes(parts[_TUPLE_PROTOCOL]))


def _tuple(key: FlowKey, zone: int) -> bytes:
    """What the client sends as an entry's tuple, by which conntrack finds it."""
    client, remote, protocol, port, remote_port = key[:4], key[4:8], key[8:9], key[9:11], key[11:]
    addresses = attribute(_IP_SOURCE, client) + attribute(_IP_DESTINATION, remote)
    if protocol == _ICMP_NUMBER:
        ports = (
            attribute(_ICMP_ID, port)
            + attribute(_ICMP_TYPE, _ECHO_REQUEST)
            + attribute(_ICMP_CODE, b"\0")
        )
    else:
        ports = attribute(_SOURCE_PORT, port) + attribute(_DESTINATION_PORT, remote_port)
    return attribute(
        _TUPLE_ORIGINAL | _NESTED,
        attribute(_TUPLE_IP | _NESTED, addresses)
        + attribute(_TUPLE_PROTOCOL | _NESTED, attribute(_NUMBER, protocol) + ports)
        + (attribute(_TUPLE_ZONE, zone.to_bytes(2, "big")) if zone else b""),
    )


def list_request() -> Message:
    """Asks for the whole conntrack table."""
    return Message(_GET, NLM_F_DUMP, _NFGEN_IPV4, "list conntrack entries")


def _from_outside(key: FlowKey, nat: Nat) -> FlowKey:
    """What the remote end sends to the translation."""
    return FlowKey(key[4:8] + nat[NAT_ADDRESS] + key[8:9] + key[11:] + nat[TRANSLATION][4:])


def _is_untouched(tuples: Tuples, key: FlowKey) -> bool:
    """Whether who sends `key` has opened the entry, and nobody translates it."""
    client, remote = key[:4], key[4:8]
    there = (tuples.source, tuples.destination)
    return there == (tuples.reply_destination, tuples.reply_source) == (client, remote)


def delete_request(key: FlowKey, zone: int) -> Message:
    """Deletes a flow's entry; the kernel answers ENOENT if it is gone."""
    return Message(_DELETE, 0, _NFGEN_IPV4 + _tuple(key, zone), f"end {Flow.of(key)}")


class LinuxFlowMonitor:
    """The flows that conntrack translates for us, in the current network namespace."""

    def __init__(self, networks: Sequence[Network]) -> None:
        self._parser = FlowParser(networks)
        self._zones = {network.name: network.zone for network in networks}
        self._ports = PortFlowReader(networks, _EVENT_SIZE)
        self._received = BatchReceiver(EVENTS_PER_BATCH, _EVENT_SIZE)
        self._requests = Netlink(_NETLINK_NETFILTER)
        self._collector = Netlink(_NETLINK_NETFILTER)
        watched = [network.prefix for network in networks if network.takeover]
        groups = (_GROUP_NEW, _GROUP_UPDATE, _GROUP_DESTROY)
        self._events = Netlink(
            _NETLINK_NETFILTER,
            groups if watched else (_GROUP_NEW, _GROUP_DESTROY),
            WANTED_BUFFER,
            wanted_events((network.prefix for network in networks), watched),
        )

    def fileno(self) -> int:
        """Readable when events are waiting."""
        return self._events.fileno()

    def read(self) -> list[FlowsChanged]:
        """The waiting events, coalesced to one batch a network; never blocks.

        A call is bounded: the descriptor stays readable if there are more. Raises EventsLost after
        an overflow, and then nothing from before it is left to read, so that `dump` tells all.
        """
        changes: dict[NetworkName, Changes] = {name: {} for name in self._zones}
        collect = partial(self._collect, changes)
        received = self._received
        try:
            for _ in range(BATCHES_PER_READ):
                lengths = self._events.event_batch(received)
                self._ports.read(received.buffer, lengths, changes, collect)
                if len(lengths) < EVENTS_PER_BATCH:
                    break
        except EventsLost:
            self._drain()
            raise
        return [FlowsChanged(network, flows) for network, flows in changes.items() if flows]

    def dump(self) -> dict[NetworkName, Sessions]:
        """Read the whole conntrack table; every network has an entry. Raises KernelFault."""
        tables: dict[NetworkName, dict[FlowKey, Nat]] = {name: {} for name in self._zones}
        for body in self._requests.dump(list_request()):
            flow = self._ports.read_listed(body) or self._parser.parse(body)
            if flow is not None:
                network, key, nat = flow
                tables[network][key] = nat
        return dict(tables)

    def collect_expired(self) -> None:
        """Have the kernel end the entries whose time is over. Raises KernelFault.

        Its own collector comes by once a minute at worst (gc_worker, nf_conntrack_core.c), but a
        dump ends what it meets (ctnetlink_dump_table, nf_conntrack_netlink.c). This one lists
        nothing, so its cost is a walk through the table within the kernel.
        """
        request = Message(_GET, NLM_F_DUMP, _NFGEN_NONE, "end expired conntrack entries")
        for _ in self._collector.dump(request):
            pass

    def end(self, network: NetworkName, flows: Iterable[FlowKey]) -> None:
        """Delete the entries of these flows; their ends are reported. Raises KernelFault.

        What the client sends is the entry's original direction if it opened the flow, and the reply
        if it was forwarded to: conntrack looks among both (nf_conntrack_find_get()).
        """
        zone = self._zones[network]
        self._requests.request((delete_request(key, zone) for key in flows), ignore=_GONE)

    def adopt(
        self, network: NetworkName, sessions: Sessions, forwarded: Collection[FlowKey] = ()
    ) -> Collection[FlowKey]:
        """Make entries of another anchor's flows, with its translations; returns those left out.

        Raises KernelFault.
        """
        rest = sessions
        for _ in range(_ADOPTIONS):
            keys = list(rest)
            faults = self._requests.attempt(list(adoption.entries(rest, forwarded)))
            for i, fault in faults.items():
                if fault.errno != errno.EEXIST:
                    raise KernelFault(f"{Flow.of(keys[i])}: {fault}", fault.errno)
            there = {keys[i]: rest[keys[i]] for i in faults}
            rest = {k: nat for k, nat in there.items() if self._is_other(network, k, nat)}
            self.loosen(there.keys() - rest.keys())
            self.end(network, rest)
            self._end_strays(rest)
            if not rest:
                break
        return rest.keys()

    def loosen(self, flows: Iterable[FlowKey]) -> None:
        """Check no windows of these TCP flows any more; of no zone. Raises KernelFault."""
        self._requests.request(adoption.loosenings(flows), ignore=_GONE)

    def _end_strays(self, sessions: Sessions) -> None:
        """End what is in the way of these flows: entries of packets that nobody translated.

        Servers sent them to the NAT address when it was here, but not the flow.
        """
        for key, nat in sessions.items():
            stray = _from_outside(key, nat)
            found = (port_tuples(body) for body in self._entry(stray, 0))
            if any(tuples is not None and _is_untouched(tuples, stray) for tuples in found):
                self._requests.request([delete_request(stray, 0)], ignore=_GONE)

    def _is_other(self, network: NetworkName, key: FlowKey, nat: Nat) -> bool:
        """Whether the flow's entry isn't there, or with another translation."""
        present = (self._parser.parse(body) for body in self._entry(key, self._zones[network]))
        return not any(
            flow is not None and flow.key == key and flow.nat[TRANSLATION] == nat[TRANSLATION]
            for flow in present
        )

    def _entry(self, key: FlowKey, zone: int) -> list[bytes]:
        """The entry with this tuple in one of its directions; empty: there is none."""
        request = Message(_GET, 0, _NFGEN_IPV4 + _tuple(key, zone))
        try:
            return list(self._requests.dump(request))
        except KernelFault as fault:
            if fault.errno not in _GONE:
                raise
            return []

    def close(self) -> None:
        """Close the sockets."""
        self._events.close()
        self._requests.close()
        self._collector.close()

    def _collect(self, changes: dict[NetworkName, Changes], datagram: bytes) -> None:
        for type_, _, _, body in split(datagram):
            flow = self._parser.parse(body)
            if flow is not None:
                changes[flow.network][flow.key] = None if type_ == _DELETE else flow.nat

    def _drain(self) -> None:
        """Throw away what waits from before the loss.

        An opening may wait there whose end was lost, and applied after a dump it would stay for
        good. The kernel also reports nothing more until the queue has been empty.
        """
        for _ in range(_MAX_DRAINED):
            with contextlib.suppress(EventsLost):
                if not self._events.event_batch(self._received):
                    return
