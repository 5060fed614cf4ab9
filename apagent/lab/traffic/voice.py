"""A voice call: 50 RTP packets a second in both directions, and when each of them arrived.

`voice HOST` calls; `voice --answer` waits for a call and speaks to where it last came from. Ends
after its time, or early and orderly on SIGTERM.
"""

from __future__ import annotations

import argparse
import select
import signal
import socket
import sys
import time

from apagent.lab.traffic import VOICE_PORT
from apagent.lab.traffic.jsonl import emit
from apagent.lab.traffic.rtp import PACKETS_PER_S, extended, packet, read_packet

_INTERVAL_NS = 1_000_000_000 // PACKETS_PER_S
_CALLER, _ANSWERER = 1, 2
"""SSRCs of the two streams."""

Address = tuple[str, int]


class _Call:
    """One end of the call; `peer` is None until somebody calls."""

    def __init__(self, udp: socket.socket, peer: Address | None, for_s: float) -> None:
        self._socket = udp
        self._peer = peer
        self._source = _ANSWERER if peer is None else _CALLER
        self._end_ns = time.monotonic_ns() + int(for_s * 1e9)
        self._start_ns = time.monotonic_ns()
        self.sent = 0
        self.received: list[tuple[int, int, int]] = []
        """Receipt (ns), full sequence number and timestamp (samples) of each packet."""
        self.sources: list[str] = []

    def stop(self, *_: object) -> None:
        """Hang up."""
        self._end_ns = 0

    def run(self) -> None:
        """Speak and listen until the end."""
        while (now := time.monotonic_ns()) < self._end_ns:
            due = now + _INTERVAL_NS if self._peer is None else self._due_ns()
            if now >= due:
                self._speak()
                due = now
            readable, _, _ = select.select([self._socket], [], [], (due - now) / 1e9)
            if readable:
                self._listen()

    def _due_ns(self) -> int:
        return self._start_ns + self.sent * _INTERVAL_NS

    def _speak(self) -> None:
        data = packet(self.sent, self._source)
        self.sent += 1
        try:
            self._socket.sendto(data, self._peer or ("", 0))
        except OSError:
            # The link is down or an ICMP error came in: the packet is lost.
            return

    def _listen(self) -> None:
        try:
            data, peer = self._socket.recvfrom(2048)
        except OSError:
            # An ICMP error speaks of a packet that is lost anyhow.
            return
        now, read = time.monotonic_ns(), read_packet(data)
        if read is None or read[2] == self._source:
            return
        if self._peer is None:
            self._start_ns = now
        if self._source == _ANSWERER:
            self._peer = peer
        self._note(now, read[0], read[1], f"{peer[0]}:{peer[1]}")

    def _note(self, now_ns: int, sequence: int, timestamp: int, source: str) -> None:
        latest = self.received[-1][1] if self.received else 0
        self.received.append((now_ns, extended(sequence, latest), timestamp))
        if source not in self.sources:
            self.sources.append(source)
        if len(self.received) == 1:
            emit("heard", time_ns=now_ns, source=source)


def main(argv: list[str] | None = None) -> int:
    """Run the program; 0: the other end was heard, 1: it was not."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("host", nargs="?", help="address of the other end")
    made.add_argument("--answer", action="store_true", help="wait for a call")
    made.add_argument("--port", type=int, default=VOICE_PORT)
    made.add_argument("--for-s", type=float, default=300.0, help="end after this time")
    options = made.parse_args(argv)
    if options.answer == bool(options.host):
        made.error("give either HOST or --answer")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.settimeout(0)
        if options.answer:
            udp.bind(("", options.port))
        peer = None if options.answer else (options.host, options.port)
        call = _Call(udp, peer, options.for_s)
        signal.signal(signal.SIGTERM, call.stop)
        emit("started", time_ns=time.monotonic_ns())
        call.run()
    _report(call)
    return 0 if call.received else 1


def _report(call: _Call) -> None:
    start = call.received[0][0] if call.received else 0
    emit(
        "packets",
        start_ns=start,
        received_us=[(now - start) // 1000 for now, _, _ in call.received],
        sequences=[sequence for _, sequence, _ in call.received],
        timestamps=[timestamp for _, _, timestamp in call.received],
    )
    emit("result", sent=call.sent, received=len(call.received), sources=call.sources)


if __name__ == "__main__":
    sys.exit(main())
