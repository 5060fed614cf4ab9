"""Many peers in one process: each serves a feed of its own with as many sessions as are wanted.

What a real agent would not see is left out: no kernel, no tunnel, no subscription of theirs unless
asked for. Commands come in as lines of JSON, answers go out as lines of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import struct
import sys
import time
from ipaddress import IPv4Address
from typing import Any

import grpc

from apagent.config import Endpoint
from apagent.core.feed import FeedContents, FeedLog
from apagent.core.model import TCP, UDP, ApId, FlowKey, Nat, NetworkName, Translation
from apagent.peers import versions
from apagent.peers.server import PeerFeedServer
from apagent.v1 import peer_pb2 as pb
from apagent.v1 import peer_pb2_grpc

LAN = NetworkName("lan")
_CLIENTS = int(IPv4Address("10.77.128.0"))
_CLIENTS_A_PEER = 200
_REMOTE = int(IPv4Address("198.18.0.1"))
_KEY = struct.Struct(">IIBHH")
_TICK_S = 0.005
_BATCH = 512


def peer_id(number: int) -> ApId:
    """The id of simulated peer `number`, from 0."""
    return ApId(f"sim{number}")


def session(peer: int, number: int) -> FlowKey:
    """Session `number` of a peer: TCP or UDP, spread over its clients."""
    client = _CLIENTS + peer * 256 + number % _CLIENTS_A_PEER + 1
    port = 1024 + number // _CLIENTS_A_PEER % 60_000
    remote = _REMOTE + number // _CLIENTS_A_PEER // 60_000
    return FlowKey(_KEY.pack(client, remote, UDP if number % 2 else TCP, port, 443))


class SimulatedPeer:
    """One AP: its sessions, their feed, and who serves it."""

    def __init__(self, number: int, sessions: int, address: str, port: int) -> None:
        self._number = number
        self.opened = sessions
        self._nat: Nat = Translation(IPv4Address(_REMOTE), 4000, 5).packed
        self._sessions = {session(number, n): self._nat for n in range(sessions)}
        self.log = FeedLog(1 + number, self._contents)
        self.server = PeerFeedServer(peer_id(number), self.log, Endpoint(address, port))

    def open(self, count: int) -> None:
        """Open more sessions, in batches as an agent would read them."""
        for first in range(0, count, _BATCH):
            numbers = range(self.opened, self.opened + min(_BATCH, count - first))
            new = {session(self._number, n): self._nat for n in numbers}
            self._sessions.update(new)
            self.log.append({LAN: new}, (), 5)
            self.opened = numbers.stop

    def _contents(self) -> FeedContents:
        return FeedContents({LAN: self._sessions}, (), 5)


async def churn(peer: SimulatedPeer, rate: float, count: int) -> None:
    """Open `count` sessions, `rate` a second."""
    started, done = time.monotonic(), 0
    while done < count:
        due = min(count, int((time.monotonic() - started) * rate) + 1)
        if due > done:
            peer.open(due - done)
            done = due
        await asyncio.sleep(_TICK_S)


async def subscribe(address: str, name: str) -> None:
    """Follow an agent's feed and forget what it says."""
    async with grpc.aio.insecure_channel(address) as channel:
        request = pb.WatchRequest(subscriber=name, protocol_version=versions.HIGHEST)
        async for _ in peer_pb2_grpc.PeerFeedStub(channel).Watch(request):
            pass


async def serve(options: argparse.Namespace) -> None:
    """Serve until standard input ends."""
    peers = [
        SimulatedPeer(n, options.sessions, options.address, options.port + n)
        for n in range(options.peers)
    ]
    for peer in peers:
        await peer.server.start()
    say("ready")
    loop = asyncio.get_running_loop()
    subscriptions: list[asyncio.Task[None]] = []
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command = json.loads(line)
        if command["do"] == "churn":
            await churn(peers[0], command["rate"], command["count"])
        elif command["do"] == "subscribe":
            subscriptions += [
                loop.create_task(subscribe(command["to"], peer_id(n)), name=peer_id(n))
                for n in range(options.peers)
            ]
        say("done")
    for task in subscriptions:
        task.cancel()


def say(event: str, **fields: Any) -> None:
    """Report."""
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    """Run the program."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--address")
    made.add_argument("--port", type=int, default=20_000, help="of the first peer")
    made.add_argument("--peers", type=int, default=1)
    made.add_argument("--sessions", type=int, default=0, help="of each peer, from the start")
    asyncio.run(serve(made.parse_args(argv)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
