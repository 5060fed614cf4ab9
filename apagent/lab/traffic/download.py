"""Download a file from `serve`, and log every receipt."""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable

from apagent.lab.traffic import DOWNLOAD_PORT
from apagent.lab.traffic.arrivals import ArrivalLog
from apagent.lab.traffic.client import Exchange, GivenUp, add_content_options, parser
from apagent.lab.traffic.content import sha256
from apagent.lab.traffic.jsonl import emit

_RECEIVE = 1 << 16


def main(argv: list[str] | None = None) -> int:
    """Run the program; 0: the file came in whole and right, 1: it did not."""
    made = parser(__doc__ or "", DOWNLOAD_PORT)
    add_content_options(made)
    return download(made.parse_args(argv))


def download(options: argparse.Namespace) -> int:
    """Download as `options` say and report."""
    log = ArrivalLog()
    digest = hashlib.sha256()
    # Ahead of the transfer, for it takes a while and would show in the timestamps.
    expected = sha256(options.seed, options.size)
    started, reason = time.monotonic_ns(), ""
    try:
        _receive(options, log, digest.update)
    except GivenUp as given_up:
        reason = str(given_up)
    ended = time.monotonic_ns()
    log.flush()
    match = digest.hexdigest() == expected
    emit(
        "result",
        completed=not reason,
        reason=reason,
        bytes=log.total,
        size=options.size,
        sha256=digest.hexdigest(),
        sha256_match=match,
        started_ns=started,
        ended_ns=ended,
    )
    return 0 if match and not reason else 1


def _receive(options: argparse.Namespace, log: ArrivalLog, update: Callable[[bytes], None]) -> None:
    exchange = Exchange(options)
    try:
        exchange.send_json(seed=options.seed, size=options.size, rate_mbit=options.rate_mbit)
        emit("connected", time_ns=time.monotonic_ns(), **exchange.receive_json())
        while log.total < options.size:
            data = exchange.receive(_RECEIVE)
            log.add(len(data), time.monotonic_ns())
            update(data)
    finally:
        exchange.close()


if __name__ == "__main__":
    sys.exit(main())
