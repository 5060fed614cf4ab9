"""iperf3: TCP and UDP, up and down, looked at in intervals of a tenth of a second."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from tests.applications.application import (
    END_S,
    SERVER,
    Figures,
    Roam,
    Scene,
    require,
    require_running,
    unused_port,
)

INTERVAL_S = 0.1
"""The shortest that iperf3 knows."""
LONGEST_SILENCE_S = 0.3
"""Linux's shortest retransmission timeout (TCP_RTO_MIN, 200 ms), to the next whole interval."""
MOST_LOST_MS_A_ROAM = 50.0
"""Of a UDP stream, on the average; an order of magnitude above what an idle machine shows."""


class Kind(NamedTuple):
    """What iperf3 is to do; `rate` is iperf3's own notation, 0: no limit."""

    protocol: str
    down: bool
    rate: str

    @property
    def options(self) -> list[str]:
        """The client's options."""
        udp = ["-u", "-l", "1200"] if self.protocol == "udp" else []
        return [*udp, *(["-R"] if self.down else []), "-b", self.rate]


class Iperf:
    """A running iperf3."""

    def __init__(
        self, kind: Kind, ends: tuple[subprocess.Popen[Any], subprocess.Popen[Any]], directory: Path
    ) -> None:
        self._kind = kind
        self._server, self._client = ends
        self._directory = directory

    def check(self) -> None:
        """Raise Broken if an end has ended."""
        require_running(self._client, "iperf3 on the client")
        require_running(self._server, "iperf3 on the server")

    def roamed(self, roam: Roam) -> None:
        """Nothing to do."""

    def finish(self, roams: Sequence[Roam]) -> Figures:
        """No silence may have been longer than a retransmission timeout."""
        self.check()
        self._client.send_signal(signal.SIGINT)
        for end in (self._client, self._server):
            end.wait(END_S)
        near, far = _report(self._directory / "client"), _report(self._directory / "server")
        sender, receiver = (far, near) if self._kind.down else (near, far)
        sums = [interval["sum"] for interval in receiver["intervals"]]
        silence = round(_longest_silence(sums), 2)
        size, seconds = sum(s["bytes"] for s in sums), sum(s["seconds"] for s in sums)
        figures: Figures = {
            "bytes": size,
            "mbit_s": round(size * 8 / seconds / 1e6, 1),
            "longest_silence_s": silence,
        }
        require(silence <= LONGEST_SILENCE_S + INTERVAL_S / 2, f"a silence of {silence} s")
        if self._kind.protocol == "udp":
            return figures | _udp_loss(sums, seconds, len(roams))
        # Interval by interval: a server whose client was interrupted may leave out the sum.
        again = sum(interval["sum"]["retransmits"] for interval in sender["intervals"])
        return figures | {"retransmits": again}


def _report(file: Path) -> dict[str, Any]:
    text = file.read_text()
    require(text, f"iperf3 has written nothing to {file.name}")
    report: dict[str, Any] = json.loads(text)
    return report


def _longest_silence(sums: list[dict[str, Any]]) -> float:
    """Seconds in which no byte was received, in whole intervals."""
    runs = groupby(sums, key=lambda interval: interval["bytes"] == 0)
    return max((sum(s["seconds"] for s in run) for silent, run in runs if silent), default=0.0)


def _udp_loss(sums: list[dict[str, Any]], seconds: float, roams: int) -> Figures:
    lost, datagrams = sum(s["lost_packets"] for s in sums), sum(s["packets"] for s in sums)
    lost_ms = round(lost / datagrams * seconds * 1e3 / max(1, roams), 1)
    require(
        lost_ms <= MOST_LOST_MS_A_ROAM,
        f"{lost} of {datagrams} datagrams lost in {roams} roams: {lost_ms} ms each",
    )
    worst = round(max(s["jitter_ms"] for s in sums), 2)
    lost_figures: Figures = {"lost": lost, "datagrams": datagrams, "lost_ms_a_roam": lost_ms}
    return lost_figures | {"worst_jitter_ms": worst}


@contextlib.contextmanager
def iperf(scene: Scene, kind: Kind) -> Iterator[Iperf]:
    """iperf3 between the client and the server, until it is told to end."""
    port, directory = unused_port(), scene.directory
    common = ["-J", "-i", str(INTERVAL_S), "-p", str(port)]
    serve = ["iperf3", "-s", "-1", *common]
    ask = ["iperf3", "-c", SERVER, "-t", "0", *common, *kind.options]
    with contextlib.ExitStack() as stack:
        far = stack.enter_context((directory / "server").open("w"))
        server = stack.enter_context(scene.process("server", serve, stdout=far))
        scene.wait_until_listening("server", port)
        near = stack.enter_context((directory / "client").open("w"))
        client = stack.enter_context(scene.process(scene.client, ask, stdout=near))
        yield Iperf(kind, (server, client), directory)
