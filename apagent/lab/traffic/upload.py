"""Upload a file to `serve`, which reports the checksum of what it got."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from apagent.lab.traffic import UPLOAD_PORT
from apagent.lab.traffic.client import Exchange, GivenUp, add_content_options, parser
from apagent.lab.traffic.content import pieces, sha256
from apagent.lab.traffic.jsonl import emit
from apagent.lab.traffic.pace import Pace


def main(argv: list[str] | None = None) -> int:
    """Run the program; 0: the file arrived whole and right, 1: it did not."""
    made = parser(__doc__ or "", UPLOAD_PORT)
    add_content_options(made)
    return upload(made.parse_args(argv))


def upload(options: argparse.Namespace) -> int:
    """Upload as `options` say and report."""
    expected = sha256(options.seed, options.size)
    answer: dict[str, Any] = {}
    started, reason = time.monotonic_ns(), ""
    try:
        answer = _send(options)
    except GivenUp as given_up:
        reason = str(given_up)
    match = answer.get("sha256") == expected
    emit(
        "result",
        **(answer | {"completed": not reason, "reason": reason, "sha256_match": match}),
        size=options.size,
        started_ns=started,
        ended_ns=time.monotonic_ns(),
    )
    return 0 if match and not reason else 1


def _send(options: argparse.Namespace) -> dict[str, Any]:
    """Send the file and return the server's words on it."""
    exchange = Exchange(options)
    try:
        exchange.send_json(size=options.size, stall_s=options.stall_s)
        emit("connected", time_ns=time.monotonic_ns(), **exchange.receive_json())
        pace = Pace(options.rate_mbit)
        for piece in pieces(options.seed, options.size, pace.piece):
            exchange.send(piece)
            time.sleep(pace.delay(len(piece), time.monotonic()))
        return exchange.receive_json()
    finally:
        exchange.close()


if __name__ == "__main__":
    sys.exit(main())
