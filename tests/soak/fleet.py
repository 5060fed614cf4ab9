"""Which applications run in the soak, and what became of each."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

from apagent.errors import ApagentError
from apagent.lab.lab import Lab
from tests.applications import http, iperf, quic, ssh, voice, websocket
from tests.applications.application import Application, Broken, Figures, Roam, Scene

Start = Callable[[Scene], AbstractContextManager[Application]]

RATE_MBIT = 4.0
"""Of each file transfer: two cores have to bear all of this at once, and be fast at roams."""
FLEET: dict[str, tuple[str, Start]] = {
    "curl HTTP/1.1 download": ("client1", lambda scene: http.download(scene, "1.1", RATE_MBIT)),
    "curl HTTP/2 download": ("client1", lambda scene: http.download(scene, "2", RATE_MBIT)),
    "curl HTTP/1.1 upload": ("client1", lambda scene: http.upload(scene, "1.1", RATE_MBIT)),
    "curl HTTP/2 upload": ("client1", lambda scene: http.upload(scene, "2", RATE_MBIT)),
    "ssh port forward": ("client2", lambda scene: ssh.forwarded_download(scene, RATE_MBIT)),
    "websocket": ("client2", websocket.websocket),
    "voice call": ("client2", voice.voice),
    "quic": ("client2", lambda scene: quic.quic(scene, rate_mbit=1)),
    "quic with migration": ("client2", lambda scene: quic.quic(scene, migrate=True, rate_mbit=1)),
    "iperf3 TCP up": ("client3", lambda scene: iperf.iperf(scene, iperf.Kind("tcp", False, "20M"))),
    "iperf3 TCP down": (
        "client3",
        lambda scene: iperf.iperf(scene, iperf.Kind("tcp", True, "20M")),
    ),
    "iperf3 UDP up": ("client3", lambda scene: iperf.iperf(scene, iperf.Kind("udp", False, "2M"))),
    "iperf3 UDP down": ("client3", lambda scene: iperf.iperf(scene, iperf.Kind("udp", True, "2M"))),
}
"""Each application's name, client and start."""
CLIENTS = 3

_FAULTS = (Broken, ApagentError, OSError, subprocess.SubprocessError)
"""How an application that has come to harm, or its programs, make themselves felt."""


class Member:
    """An application that is looked after until it is finished or broken; raises nothing."""

    def __init__(self, name: str, client: str) -> None:
        self.name = name
        self.client = client
        self.reason = ""
        self._figures: Figures = {}
        self._roams: list[Roam] = []
        self._application: Application | None = None
        self._open = contextlib.ExitStack()

    def start(self, start: Start, scene: Scene) -> Self:
        """Start it."""
        with self._watched():
            self._application = self._open.enter_context(start(scene))
        return self

    def roamed(self, roam: Roam) -> None:
        """Some client has roamed; look at the application."""
        if self._application is None:
            return
        with self._watched():
            self._application.check()
            if roam.client == self.client:
                self._roams.append(roam)
                self._application.roamed(roam)

    def finish(self) -> None:
        """End it in an orderly way."""
        if self._application is None:
            return
        with self._watched():
            self._figures = self._application.finish(self._roams)
        self.close()

    def close(self) -> None:
        """End what is left of it."""
        self._application = None
        with self._watched():
            self._open.close()

    def report(self) -> dict[str, Any]:
        """What became of it."""
        return {
            "name": self.name,
            "client": self.client,
            "passed": not self.reason,
            "reason": self.reason,
            "roams": len(self._roams),
            "figures": self._figures,
        }

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except _FAULTS as fault:
            self.reason = self.reason or f"{type(fault).__name__}: {fault}"
            if self._application is not None:
                self.close()


def start_all(lab: Lab, directory: Path, for_s: float) -> list[Member]:
    """Start the whole fleet."""
    members = []
    for number, (name, (client, start)) in enumerate(FLEET.items()):
        own = directory / str(number)
        own.mkdir()
        members.append(Member(name, client).start(start, Scene(lab, client, own, for_s)))
    return members


def finish_all(members: Sequence[Member]) -> None:
    """Finish the whole fleet."""
    for member in members:
        member.finish()
