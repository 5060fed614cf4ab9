"""Sends packets of one flow as fast as they go, and says what CPU time each has cost.

The virtual links of a lab work a packet off where it is sent: on the way through the whole lab, in
the sender's own time or in that of the kernel's softirq threads. So the time of both together,
divided by the packets, is the cost of the path.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from ipaddress import IPv4Address
from pathlib import Path

from apagent.lab.plan import SERVER_ADDRESS
from tests.bench.load import Frames, Sender, frame, packet_socket

_BATCH = 64
_FLOW = 1
"""The number of the flow: UDP."""
_NANO = 1e9


def softirq_s() -> float:
    """CPU time of all softirq threads so far."""
    total = 0
    for comm in Path("/proc").glob("[0-9]*/comm"):
        try:
            if comm.read_text(encoding="ascii").startswith("ksoftirqd/"):
                total += int((comm.parent / "schedstat").read_text(encoding="ascii").split()[0])
        except (FileNotFoundError, ProcessLookupError, UnicodeDecodeError):
            continue
    return total / _NANO


def main(argv: list[str] | None = None) -> int:
    """Send so many packets for every line that comes in, and report."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--interface")
    made.add_argument("--mac", type=lambda text: bytes.fromhex(text.replace(":", "")))
    made.add_argument("--gateway", type=lambda text: bytes.fromhex(text.replace(":", "")))
    made.add_argument("--address", type=IPv4Address)
    options = made.parse_args(argv)
    sender = Sender(options.mac, options.gateway, options.address)
    frames = Frames([frame(sender, _FLOW, SERVER_ADDRESS)] * _BATCH)
    packets = packet_socket(options.interface)
    _say({"event": "ready"})
    for line in sys.stdin:
        wanted, sent = int(line), 0
        softirq, used, began = softirq_s(), time.process_time(), time.monotonic()
        while sent < wanted:
            sent += frames.send(packets, 0, min(_BATCH, wanted - sent))
        took_s = time.monotonic() - began
        used_s = time.process_time() - used + softirq_s() - softirq
        _say({"event": "sent", "packets": sent, "took_s": took_s, "cpu_s": used_s})
    return 0


def _say(event: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
