"""A QUIC connection; with migration, the client takes a new port after every roam."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence

from apagent.lab.lab import Lab
from apagent.lab.measure import Arrivals
from apagent.lab.traffic.running import Running
from tests.applications import certificate
from tests.applications.application import (
    END_S,
    SERVER,
    START_S,
    Figures,
    Roam,
    Scene,
    interruptions,
    rate_mbit,
    require_equal,
    require_unfinished,
    unused_port,
    uplink,
    wait_until,
)

_PROGRAM = "tests.applications.programs.quic"


class Quic:
    """Both ends of a connection."""

    def __init__(self, lab: Lab, server: Running, client: Running, home: str) -> None:
        self._lab = lab
        self._server = server
        self._client = client
        self._anchors = [home]
        client.wait_for("connected", START_S)

    @property
    def seen_from(self) -> list[str]:
        """The addresses that the server has seen the client come from, one per client port."""
        return [event["address"] for event in self._server.events if event["event"] == "peer"]

    def check(self) -> None:
        """Raise Broken if an end has ended, or the server has closed the connection."""
        require_unfinished(self._client)
        require_equal("connections that the server has closed", self._closed(), [])

    def roamed(self, roam: Roam) -> None:
        """Nothing to do: the connection stays as it is."""

    def migrate(self, ap: str) -> None:
        """The client takes a new port; wait until it has spoken from there, before it roams on.

        That may take a moment: a sender whose congestion window is full has to wait, too.
        """
        self._anchors.append(uplink(self._lab, ap))
        self._client.process.send_signal(signal.SIGUSR1)
        count = len(self._anchors)
        wait_until(lambda: len(self.seen_from) >= count, "the server sees the client's new port")

    def finish(self, roams: Sequence[Roam]) -> Figures:
        """What was sent has to have come back whole, from the anchors that were wanted."""
        self.check()
        self._client.stop()
        result = self._client.result(END_S)
        require_equal("echo is whole", result["sha256_match"], True)
        require_equal("bytes that came back", result["received"], result["sent"])
        require_equal("the client's addresses", self.seen_from, self._anchors)
        arrivals = Arrivals.of(self._client.events)
        seconds = (arrivals.times_ns[-1] - arrivals.times_ns[0]) / 1e9
        rates = {"bytes": result["sent"], "mbit_s": rate_mbit(result["sent"], seconds)}
        return {**rates, "paths": len(self._anchors), **interruptions(arrivals, roams)}

    def _closed(self) -> list[str]:
        events = self._server.events
        return [event["reason"] for event in events if event["event"] == "closed"]


class MigratingQuic(Quic):
    """The client migrates after every roam, so that the new AP anchors the connection."""

    def roamed(self, roam: Roam) -> None:
        """Take a new port."""
        self.migrate(roam.there)


@contextlib.contextmanager
def quic(scene: Scene, *, migrate: bool = False, rate_mbit: float = 2.0) -> Iterator[Quic]:
    """A connection from the client to the server."""
    made, home = certificate.make(scene.directory), scene.anchor()
    address = (SERVER, "--port", unused_port())
    with scene.program("server", _PROGRAM, "serve", *address, *made.options) as server:
        server.wait_for("listening", START_S)
        trust = ("--certificate", made.certificate, "--rate-mbit", rate_mbit)
        with scene.program(scene.client, _PROGRAM, "talk", *address, *trust) as talker:
            yield (MigratingQuic if migrate else Quic)(scene.lab, server, talker, home)
