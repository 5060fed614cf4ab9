"""Which AP has which NAT address on its uplink, looked at ten times a second."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

from apagent.kernel.links import addresses
from apagent.kernel.wire import Netlink
from apagent.lab import build
from apagent.lab.lab import Lab

_EVERY_S = 0.1

Holdings = dict[str, frozenset[str]]
"""Addresses -> the APs that have it."""


class Holders:
    """All changes of who has what: when (CLOCK_MONOTONIC, s), and everything from then on."""

    def __init__(self, lab: Lab) -> None:
        self.changes: list[tuple[float, Holdings]] = []
        self._lab = lab
        self._ended = threading.Event()
        self._movable = {str(lab.plan.nat_address(ap)) for ap in lab.aps}

    def run(self) -> None:
        """Look until `stop`."""
        with ExitStack() as stack:
            place = self._lab.place
            sockets = {
                ap: stack.enter_context(build.route_socket(place, ap)) for ap in self._lab.aps
            }
            while True:
                found = self._look(sockets)
                if not self.changes or self.changes[-1][1] != found:
                    self.changes.append((time.monotonic(), found))
                if self._ended.wait(_EVERY_S):
                    return

    def stop(self) -> None:
        """No more."""
        self._ended.set()

    def _look(self, sockets: dict[str, Netlink]) -> Holdings:
        there = {
            ap: {str(address.local) for address in addresses(netlink)} & self._movable
            for ap, netlink in sockets.items()
        }
        return {
            address: frozenset(ap for ap, held in there.items() if address in held)
            for address in self._movable
        }


@contextlib.contextmanager
def watching_holders(lab: Lab) -> Iterator[Holders]:
    """Look for the length of the block."""
    holders = Holders(lab)
    thread = threading.Thread(target=holders.run, name="holders")
    thread.start()
    try:
        yield holders
    finally:
        holders.stop()
        thread.join()
