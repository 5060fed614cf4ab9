"""When a flow's first packet reached the anchor, and when every other AP's kernel held the flow.

Watches a sample of the flows that `tests.bench.load` opens, told by their ports: the packets at the
anchor by the kernel's own timestamps; the entries by the kernel's notifications, nf_tables' about
elements or conntrack's about entries, at the moment when they can be read. The program asks for
real-time priority, so that it reads at once also where all processors are busy. Times are parsed
when all is over.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Network

from apagent.core.model import FlowKey
from apagent.kernel.conntrack import port_tuples
from apagent.kernel.nft.elements import FLOW_SIZE, parse_elements, unpack_flow
from apagent.kernel.wire import split
from apagent.lab import namespaces
from tests.bench.load import REMOTES

SAMPLE_MASK = 0x1E
"""A flow is watched if its client's port has none of these bits: one in 16, TCP and UDP."""
_NETLINK_NETFILTER = 12
_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_GROUP_CONNTRACK_NEW, _GROUP_NFTABLES = 1, 7
_NFT_NEW_ELEMENT = 10 << 8 | 12
_SO_ATTACH_FILTER = 26
_SO_TIMESTAMPNS = 35
_SO_RCVBUFFORCE = 33
_BUFFER = 64 << 20
_ETH_P_IP = 0x0800
_PRIORITY = 20
_PORT_IN_FRAME, _PORT_IN_EVENT = 34, 60
"""Where the client's port stands: behind Ethernet and IPv4 headers; behind the headers of a
ctnetlink message in the kernel's own order."""
_TIMESPEC = struct.Struct("=qq")

Key = bytes
"""Remote address, protocol, client's port."""


@dataclass
class Watched:
    """What came in on one socket: (nanoseconds of CLOCK_REALTIME, datagram)."""

    socket: socket.socket
    is_nft: bool
    seen: list[tuple[int, bytes]] = field(default_factory=list)


def _sample(target: socket.socket, offset: int) -> None:
    """Have the kernel queue only what has a sampled port at `offset`: classic BPF, socket(7)."""
    load_half, bitwise_and, if_equal, return_ = 0x28, 0x54, 0x15, 0x06
    instruction = struct.Struct("=HBBI").pack
    program = b"".join(
        (
            instruction(load_half, 0, 0, offset),
            instruction(bitwise_and, 0, 0, SAMPLE_MASK),
            instruction(if_equal, 0, 1, 0),
            instruction(return_, 0, 0, 0xFFFFFFFF),
            instruction(return_, 0, 0, 0),
        )
    )
    code = ctypes.create_string_buffer(program, len(program))
    count = len(program) // 8
    head = struct.pack("@HP", count, ctypes.addressof(code))
    target.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, head)


def _packets(interface: str) -> socket.socket:
    packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    _sample(packets, _PORT_IN_FRAME)
    _prepare(packets)
    packets.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    packets.bind((interface, _ETH_P_IP))
    return packets


def _notifications(group: int) -> socket.socket:
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
    if group == _GROUP_CONNTRACK_NEW:
        _sample(netlink, _PORT_IN_EVENT)
    _prepare(netlink)
    netlink.bind((0, 0))
    netlink.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
    return netlink


def _prepare(one: socket.socket) -> None:
    with contextlib.suppress(PermissionError):
        one.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
    one.setblocking(False)


def first_packets(packets: socket.socket) -> dict[Key, int]:
    """When the first packet of each flow was seen."""
    firsts: dict[Key, int] = {}
    with contextlib.suppress(BlockingIOError):
        while True:
            frame, control, _, _ = packets.recvmsg(256, 64)
            seconds, nanoseconds = _TIMESPEC.unpack(control[0][2])
            # Remote address, protocol, client's port.
            key = frame[30:34] + frame[23:24] + frame[34:36]
            firsts.setdefault(key, seconds * 1_000_000_000 + nanoseconds)
    return firsts


def entries(watched: Watched) -> Iterator[tuple[Key, int]]:
    """The flows that one AP's kernel came to hold, and when."""
    for seen_ns, datagram in watched.seen:
        for type_, _, _, body in split(datagram):
            if not watched.is_nft:
                tuples = port_tuples(body)
                if tuples is not None:
                    yield tuples.destination + tuples.protocol + tuples.source_port, seen_ns
            elif type_ == _NFT_NEW_ELEMENT and b"_flows\0" in body[:64]:
                for element, _ in parse_elements(body, FLOW_SIZE):
                    key: FlowKey = unpack_flow(element)
                    yield key[4:11], seen_ns


def watch(sockets: list[Watched], ended: list[bool]) -> None:
    """Read with the time of reading, until asked to end."""
    poll = select.poll()
    by_descriptor = {one.socket.fileno(): one for one in sockets}
    for descriptor in by_descriptor:
        poll.register(descriptor, select.POLLIN)
    while not ended[0]:
        for descriptor, _ in poll.poll(100):
            one = by_descriptor[descriptor]
            with contextlib.suppress(BlockingIOError):
                while True:
                    datagram = one.socket.recv(1 << 16)
                    one.seen.append((time.time_ns(), datagram))


def latencies_us(firsts: dict[Key, int], watched: Watched) -> list[int]:
    """From the first packet at the anchor to the entry, for every sampled flow that came."""
    remotes = IPv4Network(REMOTES)
    first, last = remotes.network_address.packed, remotes.broadcast_address.packed
    arrived: dict[Key, int] = {}
    for key, seen_ns in entries(watched):
        arrived.setdefault(key, seen_ns)
    return [
        (arrived[key] - at) // 1000
        for key, at in firsts.items()
        if key in arrived and first <= key[:4] <= last
    ]


def main(argv: list[str] | None = None) -> int:
    """Watch until SIGTERM, then say what was seen."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--anchor", help="namespace of the anchor")
    made.add_argument("--interface", default="br-lan")
    made.add_argument("--conntrack", action="store_true", help="entries of conntrack, not nftables")
    made.add_argument("others", nargs="+", help="namespaces of the other APs")
    options = made.parse_args(argv)
    ended = [False]
    signal.signal(signal.SIGTERM, lambda *_: ended.__setitem__(0, True))
    with namespaces.inside(options.anchor):
        packets = _packets(options.interface)
    group = _GROUP_CONNTRACK_NEW if options.conntrack else _GROUP_NFTABLES
    sockets = []
    for other in options.others:
        with namespaces.inside(other):
            sockets.append(Watched(_notifications(group), not options.conntrack))
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(_PRIORITY))
    _say("ready")
    watch(sockets, ended)
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    firsts = first_packets(packets)
    _say("result", watched=len(firsts), latencies_us=[latencies_us(firsts, one) for one in sockets])
    return 0


def _say(event: str, **fields: object) -> None:
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
