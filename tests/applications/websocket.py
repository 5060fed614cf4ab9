"""A WebSocket with messages both ways and pings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from apagent.lab.traffic.running import Running
from tests.applications.application import (
    END_S,
    SERVER,
    START_S,
    Figures,
    Roam,
    Scene,
    require_equal,
    require_unfinished,
    unused_port,
)

_PROGRAM = "tests.applications.programs.websocket"
_NORMAL_CLOSURE = 1000
"""RFC 6455, 7.4.1."""


class WebSocket:
    """Both ends of a conversation."""

    def __init__(self, server: Running, client: Running, seen_from: str) -> None:
        self._server = server
        self._client = client
        self._seen_from = seen_from
        client.wait_for("connected", START_S)

    def check(self) -> None:
        """Raise Broken if an end has ended."""
        require_unfinished(self._server)
        require_unfinished(self._client)

    def roamed(self, roam: Roam) -> None:
        """Nothing to do."""

    def finish(self, roams: Sequence[Roam]) -> Figures:
        """All messages have to have arrived, in order and unchanged, over one connection."""
        self.check()
        self._client.stop()
        near, far = self._client.result(END_S), self._server.result(END_S)
        for end, other in ((near, far), (far, near)):
            wanted = (other["sent"], other["sent"], 0, _NORMAL_CLOSURE)
            found = tuple(end[key] for key in ("received", "peer_sent", "wrong", "close_code"))
            require_equal("received, said to be sent, wrong, close code", found, wanted)
        seen = [event["client"] for event in self._server.events if event["event"] == "connected"]
        require_equal("the addresses that connected", seen, [self._seen_from])
        return {
            "messages_up": near["sent"],
            "messages_down": far["sent"],
            "longest_gap_up_ms": far["longest_gap_ms"],
            "longest_gap_down_ms": near["longest_gap_ms"],
            "pings": near["pings"],
            "longest_ping_ms": near["longest_ping_ms"],
        }


@contextlib.contextmanager
def websocket(scene: Scene) -> Iterator[WebSocket]:
    """A conversation between the client and the server."""
    home, address = scene.anchor(), (SERVER, "--port", unused_port())
    with scene.program("server", _PROGRAM, "serve", *address) as server:
        server.wait_for("listening", START_S)
        with scene.program(scene.client, _PROGRAM, "talk", *address) as talker:
            yield WebSocket(server, talker, home)
