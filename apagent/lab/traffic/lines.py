"""An interactive session in miniature: send a line, wait for its echo, measure how long it took."""

from __future__ import annotations

import argparse
import sys
import time

from apagent.lab.traffic import LINES_PORT
from apagent.lab.traffic.client import Exchange, GivenUp, parser
from apagent.lab.traffic.jsonl import emit


def main(argv: list[str] | None = None) -> int:
    """Run the program; 0: every line was echoed, 1: it was not."""
    made = parser(__doc__ or "", LINES_PORT)
    made.add_argument("--count", type=int, default=100, help="lines to send")
    made.add_argument("--interval-ms", type=float, default=50.0, help="between two lines")
    return lines(made.parse_args(argv))


def lines(options: argparse.Namespace) -> int:
    """Exchange lines as `options` say, and report each with its latency."""
    latencies: list[int] = []
    reason = ""
    try:
        _talk(options, latencies)
    except GivenUp as given_up:
        reason = str(given_up)
    emit(
        "result",
        completed=not reason,
        reason=reason,
        count=options.count,
        echoed=len(latencies),
        median_latency_us=sorted(latencies)[len(latencies) // 2] if latencies else None,
        max_latency_us=max(latencies, default=None),
    )
    return 1 if reason else 0


def _talk(options: argparse.Namespace, latencies: list[int]) -> None:
    """Append a latency in microseconds for every line that came back."""
    exchange = Exchange(options)
    try:
        emit("connected", time_ns=time.monotonic_ns(), **exchange.receive_json())
        for number in range(options.count):
            sent = time.monotonic_ns()
            _ask(exchange, f"line {number} at {sent}".encode())
            latencies.append((time.monotonic_ns() - sent) // 1000)
            emit("line", number=number, sent_ns=sent, latency_us=latencies[-1])
            rest = options.interval_ms / 1e3 - latencies[-1] / 1e6
            time.sleep(max(0.0, rest) if number + 1 < options.count else 0.0)
    finally:
        exchange.close()


def _ask(exchange: Exchange, line: bytes) -> None:
    exchange.send(line + b"\n")
    echo = exchange.receive_line()
    if echo != line:
        raise GivenUp(f"sent {line!r}, got {echo!r} back")


if __name__ == "__main__":
    sys.exit(main())
