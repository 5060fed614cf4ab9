"""UDP echo at a fixed rate, from one socket: what was lost, when, and from where it seemed to come.

Ends after its duration, or early and orderly on SIGTERM.
"""

from __future__ import annotations

import argparse
import select
import signal
import socket
import sys
import time
from array import array
from dataclasses import dataclass

from apagent.lab.traffic import ECHO_PORT
from apagent.lab.traffic.datagram import read_answer, request
from apagent.lab.traffic.jsonl import emit

GRACE_NS = 500_000_000
"""How long answers are waited for after the last request."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Requests in a row that stayed without an answer."""

    first: int
    lost: int
    from_ns: int
    """When the first lost one was sent."""
    to_ns: int
    """When the next one that was answered was sent; 0: none was."""


class Echoes:
    """When each request was sent and answered, by sequence number (ns; 0: no answer)."""

    def __init__(self) -> None:
        self.sent = array("q")
        self.received = array("q")
        self.sources: list[str] = []

    def note_sent(self, now_ns: int) -> None:
        """The next request was sent."""
        self.sent.append(now_ns)
        self.received.append(0)

    def note_received(self, sequence: int, source: str, now_ns: int) -> None:
        """An answer came; only the first one to a request counts."""
        if sequence < len(self.received) and not self.received[sequence]:
            self.received[sequence] = now_ns
        if source not in self.sources:
            self.sources.append(source)

    def gaps(self) -> list[Gap]:
        """All the gaps, in order."""
        found: list[Gap] = []
        first: int | None = None
        for sequence, answered in enumerate(self.received):
            if answered and first is not None:
                found.append(self._gap(first, sequence, self.sent[sequence]))
                first = None
            elif not answered and first is None:
                first = sequence
        if first is not None:
            found.append(self._gap(first, len(self.sent), 0))
        return found

    def _gap(self, first: int, behind: int, to_ns: int) -> Gap:
        return Gap(first, behind - first, self.sent[first], to_ns)


class _Sender:
    """Sends what is due and takes what came in."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.settimeout(0)
        self._target = (options.host, options.port)
        self._interval_ns = int(1e9 / options.rate)
        self._start_ns = time.monotonic_ns()
        self._end_ns = self._start_ns + int(options.duration_s * 1e9)
        self.echoes = Echoes()

    def stop(self, *_: object) -> None:
        """Send no more; wait for answers only."""
        self._end_ns = min(self._end_ns, time.monotonic_ns())

    def run(self) -> None:
        """Until the end and the grace time are over, or all is answered."""
        while (now := time.monotonic_ns()) < self._end_ns + GRACE_NS:
            due = self._start_ns + len(self.echoes.sent) * self._interval_ns
            if due >= self._end_ns:
                if all(self.echoes.received):
                    return
                due = self._end_ns + GRACE_NS
            elif now >= due:
                self._send()
                due = now
            self._wait(max(0, due - now))

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _send(self) -> None:
        sequence = len(self.echoes.sent)
        self.echoes.note_sent(time.monotonic_ns())
        try:
            self._socket.sendto(request(sequence), self._target)
        except OSError:
            # The link is down or an ICMP error came in: the request counts as lost.
            return

    def _wait(self, timeout_ns: int) -> None:
        readable, _, _ = select.select([self._socket], [], [], timeout_ns / 1e9)
        if not readable:
            return
        try:
            data = self._socket.recv(2048)
        except OSError:
            # An ICMP error: the request that it speaks about stays unanswered.
            return
        answer = read_answer(data)
        if answer is not None:
            self.echoes.note_received(*answer, time.monotonic_ns())


def main(argv: list[str] | None = None) -> int:
    """Run the program; 0: at least one request was answered, 1: none."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("host", help="address of the server")
    made.add_argument("--port", type=int, default=ECHO_PORT)
    made.add_argument("--rate", type=float, default=1000.0, help="requests a second")
    made.add_argument("--duration-s", type=float, default=10.0)
    options = made.parse_args(argv)
    sender = _Sender(options)
    signal.signal(signal.SIGTERM, sender.stop)
    emit("started", time_ns=time.monotonic_ns())
    try:
        sender.run()
    finally:
        sender.close()
    _report(sender.echoes)
    return 0 if any(sender.echoes.received) else 1


def _report(echoes: Echoes) -> None:
    start = echoes.sent[0] if echoes.sent else 0
    emit(
        "echoes",
        start_ns=start,
        sent_us=[(sent - start) // 1000 for sent in echoes.sent],
        received_us=[(got - start) // 1000 if got else None for got in echoes.received],
    )
    gaps = echoes.gaps()
    emit(
        "result",
        sent=len(echoes.sent),
        received=len(echoes.sent) - sum(gap.lost for gap in gaps),
        lost=sum(gap.lost for gap in gaps),
        gaps=[
            {"first": g.first, "lost": g.lost, "from_ns": g.from_ns, "to_ns": g.to_ns} for g in gaps
        ],
        sources=echoes.sources,
    )


if __name__ == "__main__":
    sys.exit(main())
