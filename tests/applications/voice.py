"""A voice call: 50 RTP packets a second each way; loss and jitter around every roam."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from apagent.lab.jitter import Reception
from apagent.lab.traffic.running import Running
from tests.applications.application import (
    END_S,
    SERVER,
    START_S,
    Figures,
    Roam,
    Scene,
    require,
    require_equal,
    require_unfinished,
    unused_port,
)

MOST_LOST_A_ROAM = 1.0
"""Packets, on the average of a call and direction: an interruption of up to 20 ms costs one."""


class Voice:
    """Both ends of a call."""

    def __init__(self, answerer: Running, caller: Running, home: str) -> None:
        self._answerer = answerer
        self._caller = caller
        self._home = home
        caller.wait_for("heard", START_S)

    def check(self) -> None:
        """Raise Broken if an end has ended."""
        require_unfinished(self._answerer)
        require_unfinished(self._caller)

    def roamed(self, roam: Roam) -> None:
        """Nothing to do."""

    def finish(self, roams: Sequence[Roam]) -> Figures:
        """Loss has to be bounded, and the call to have come from one socket throughout."""
        self.check()
        for end in (self._caller, self._answerer):
            end.stop()
        near, far = self._caller.result(END_S), self._answerer.result(END_S)
        require_equal("sockets that called", len(far["sources"]), 1)
        require_equal("address that called", far["sources"][0].split(":")[0], self._home)
        require_equal("sockets that answered", len(near["sources"]), 1)
        up, down = Reception.of(self._answerer.events), Reception.of(self._caller.events)
        return {**_figures("up", up, roams), **_figures("down", down, roams)}


def _figures(direction: str, reception: Reception, roams: Sequence[Roam]) -> Figures:
    most = MOST_LOST_A_ROAM * len(roams)
    lost, doubled = reception.lost, reception.doubled
    require(lost <= most, f"{direction}: {lost} packets lost in {len(roams)} roams")
    require_equal(f"{direction}: packets that came twice", doubled, 0)
    around = reception.jitter_around([roam.linked_ns for roam in roams])
    return {
        f"packets_{direction}": reception.expected,
        f"lost_{direction}": lost,
        f"longest_silence_{direction}_ms": round(reception.longest_silence_ms(), 1),
        f"jitter_{direction}_ms": {
            "before": [round(a.before, 2) for a in around],
            "during": [round(a.during, 2) for a in around],
            "after": [round(a.after, 2) for a in around],
        },
    }


@contextlib.contextmanager
def voice(scene: Scene) -> Iterator[Voice]:
    """The client calls the server."""
    home, port = scene.anchor(), ("--port", unused_port())
    with scene.program("server", "voice", "--answer", *port) as answerer:
        answerer.wait_for("started", START_S)
        with scene.program(scene.client, "voice", SERVER, *port) as caller:
            yield Voice(answerer, caller, home)
