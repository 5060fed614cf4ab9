"""Where a flow's CPU time goes between two agents, stage by stage and without a kernel.

Two engines in one process; what the kernel would report goes in, what the kernel would be sent
comes out. What is missing to the figures of `replication` is the kernel's part, gRPC and the event
loop.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address

from apagent.core.effects import Publish
from apagent.core.engine import Engine
from apagent.core.events import (
    ClientSeen,
    FlowsChanged,
    FlowsListed,
    Source,
    SyncTimedOut,
)
from apagent.core.feed import FeedContents, FeedLog
from apagent.kernel.nft.elements import pack_data, transactions
from apagent.kernel.nft.sets import Names, anchor_value
from apagent.kernel.nft.table import session_changes
from apagent.kernel.port_flows import Changes, PortFlowReader
from apagent.kernel.wire import HEADER
from apagent.peers.follower import Follower
from apagent.peers.publisher import Publisher, SharedDeltas
from apagent.v1 import peer_pb2 as pb
from tests.bench.rows import Row, alone
from tests.bench.runner import Group, Result, Samples, Trial
from tests.bench.scale import Scale
from tests.domains import ANN, AP1, AP2, LAN, domain
from tests.unit.test_conntrack_parse import TCP_NEW, UDP_NEW

_BATCH, _FLOWS = 60, 30_000
_SIZE = 2048
_NEW = 0x100
_CLIENT, _OUTSIDE = IPv4Address("10.77.1.1"), IPv4Address("203.0.113.11")
_MICRO = 1e6
STAGES = {
    "read": "anchor: conntrack events to flows",
    "anchor_engine": "anchor: engine",
    "publish": "anchor: feed log and message",
    "follow": "peer: message to flows",
    "peer_engine": "peer: engine",
    "deltas": "peer: what the kernel should change",
    "nft": "peer: nftables messages",
}


def groups(scale: Scale) -> list[Group]:
    """One group."""
    return [Group("stages", scale.rounds, [Trial(f"batches of {_BATCH}", "both", measure)], _rows)]


def event(number: int) -> bytes:
    """A conntrack event as a kernel sends it, of TCP and UDP in turn."""
    body = bytearray(UDP_NEW if number % 2 else TCP_NEW)
    port = struct.pack(">H", 1024 + number % 60_000)
    body[16:20], body[76:80] = _CLIENT.packed, _OUTSIDE.packed
    body[44:46] = body[104:106] = port
    return HEADER.pack(HEADER.size + len(body), _NEW, 0x600, 0, 0) + bytes(body)


class Stages:
    """Two APs' halves of the way, and the time that each stage has taken."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(STAGES, 0.0)
        self._here, self._there = domain(AP1, 2), domain(AP2, 2)
        self._anchor, self._peer = Engine(self._here), Engine(self._there)
        self._feed = FeedLog(1, self._contents)
        self._reader = PortFlowReader(self._here.networks, _SIZE)
        self._data = {ap.id: pack_data(anchor_value(ap.number)) for ap in self._there.peers}
        self._follower = Follower(AP1, self._there.networks, self._peer.sessions)
        for engine in (self._anchor, self._peer):
            engine.step(FlowsListed({}), 0.0)
            engine.step(SyncTimedOut(), 0.0)
            engine.take_deltas()
        self._anchor.step(ClientSeen(LAN, ANN, Source.FDB, _CLIENT), 0.0)
        request = self._follower.request(AP2)
        self._publisher = Publisher(SharedDeltas(AP1), self._feed, 2, request)
        self._follow([message.SerializeToString() for message in self._publisher.news()])
        self._peer.take_deltas()

    def take(self, events: list[bytes]) -> None:
        """One batch, all the way."""
        buffer = bytearray().join(event.ljust(_SIZE, b"\0") for event in events)
        lengths = [len(event) for event in events]
        with self._timed("read"):
            changes: dict[str, Changes] = {LAN: {}}
            self._reader.read(buffer, lengths, changes, _unexpected)  # type: ignore[arg-type]
        with self._timed("anchor_engine"):
            effects = self._anchor.step(FlowsChanged(LAN, changes[LAN]), 0.0)
            self._anchor.take_deltas()
        with self._timed("publish"):
            for effect in effects:
                if isinstance(effect, Publish):
                    self._feed.append(effect.tables, effect.claims, effect.clock, effect.anchor)
            sent = [message.SerializeToString() for message in self._publisher.news()]
        self._follow(sent)
        with self._timed("deltas"):
            deltas = self._peer.take_deltas()
        with self._timed("nft"):
            for name, delta in deltas.items():
                wanted = session_changes(Names.of(name), delta, self._data)
                list(transactions("apagent", wanted))

    def _follow(self, sent: list[bytes]) -> None:
        with self._timed("follow"):
            heard = [
                event
                for message in sent
                for event in self._follower.take_untrusted(pb.FeedMessage.FromString(message))
            ]
        with self._timed("peer_engine"):
            for event in heard:
                self._peer.step(event, 0.0)

    def _contents(self) -> FeedContents:
        tables, claims = self._anchor.snapshot()
        return FeedContents(tables, claims, self._anchor.clock, digests=self._anchor.digests(AP1))

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.thread_time()
        yield
        self.spent[stage] += time.thread_time() - began


def measure() -> Result:
    """Time of each stage per flow."""
    stages = Stages()
    stages.spent = dict.fromkeys(STAGES, 0.0)
    for first in range(0, _FLOWS, _BATCH):
        stages.take([event(number) for number in range(first, first + _BATCH)])
    return {stage: spent / _FLOWS * _MICRO for stage, spent in stages.spent.items()}


def _unexpected(datagram: bytes) -> None:
    raise AssertionError(f"the fast reader left {datagram.hex()}")


def _rows(samples: Samples) -> list[Row]:
    return [
        row
        for case in samples.cases()
        for stage, what in STAGES.items()
        for row in alone(f"stages.{stage}", what, samples.values(case, "both", stage), "µs a flow")
    ]
