"""curl and a web server over TLS: an endless download and an upload, checked by checksum."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any

from apagent.lab.measure import Arrivals
from apagent.lab.traffic.content import pieces
from apagent.lab.traffic.pace import Pace
from apagent.lab.traffic.running import Running
from tests.applications import certificate
from tests.applications.application import (
    END_S,
    SERVER,
    Figures,
    Roam,
    Scene,
    interruptions,
    rate_mbit,
    require_equal,
    require_running,
    unused_port,
    wait_until,
)

_PROGRAM = "tests.applications.programs.http_server"
_ENDLESS = 1 << 50
_READ = 1 << 16
VERSIONS = {"1.1": "--http1.1", "2": "--http2"}


class Server:
    """The web server on the server node."""

    def __init__(self, program: Running, port: int, made: certificate.Certificate) -> None:
        self._program = program
        self.port = port
        self.certificate = made.certificate

    def end_downloads(self) -> None:
        """Bring all running downloads to an orderly end."""
        self._program.process.send_signal(signal.SIGUSR1)

    def requests(self) -> list[dict[str, Any]]:
        """The requests so far."""
        return [event for event in self._program.events if event["event"] == "request"]

    def served(self) -> dict[str, Any]:
        """The one request that it has served to the end."""
        return self._program.wait_for("served", END_S)


@contextlib.contextmanager
def server(scene: Scene, rate_mbit: float) -> Iterator[Server]:
    """A web server that listens when the block begins; the rate is that of downloads."""
    made, port = certificate.make(scene.directory), unused_port()
    options = ("--address", SERVER, "--port", port, "--rate-mbit", rate_mbit, *made.options)
    with scene.program("server", _PROGRAM, *options) as program:
        scene.wait_until_listening("server", port)
        yield Server(program, port, made)


class Sink(threading.Thread):
    """Takes in what a program writes: checksum, and when each piece came."""

    def __init__(self, pipe: IO[bytes]) -> None:
        super().__init__(name="sink", daemon=True)
        self._pipe = pipe
        self._times_ns: list[int] = []
        self._sizes: list[int] = []
        self.digest = hashlib.sha256()
        self.start()

    @property
    def arrivals(self) -> Arrivals:
        """All receipts so far."""
        return Arrivals(tuple(self._times_ns), tuple(self._sizes))

    def run(self) -> None:
        """Read to the end."""
        while data := os.read(self._pipe.fileno(), _READ):
            self._times_ns.append(time.monotonic_ns())
            self._sizes.append(len(data))
            self.digest.update(data)


class Source(threading.Thread):
    """Writes pseudo-random content to a program at a steady rate until it is told to end."""

    def __init__(self, pipe: IO[bytes], rate_mbit: float) -> None:
        super().__init__(name="source", daemon=True)
        self._pipe = pipe
        self._pace = Pace(rate_mbit)
        self.ended = threading.Event()
        self.size = 0
        self.digest = hashlib.sha256()
        self.start()

    def run(self) -> None:
        """Write to the end, then close the pipe; a reader that has gone is the end, too."""
        with contextlib.suppress(BrokenPipeError), self._pipe:
            for piece in pieces(2, _ENDLESS, self._pace.piece):
                self._pipe.write(piece)
                self.digest.update(piece)
                self.size += len(piece)
                if self.ended.wait(self._pace.delay(len(piece), time.monotonic())):
                    break


class Curl:
    """A running curl; it prints the HTTP version and the status at its end."""

    def __init__(self, scene: Scene, version: str, url: str, *options: str) -> None:
        argv = ["curl", "-q", "-sS", VERSIONS[version], "--fail", "--output", "-", *options]
        argv += ["--max-time", str(scene.for_s)]
        argv += ["--write-out", "%{stderr}%{http_version} %{http_code} %{num_connects}", url]
        pipe, client = subprocess.PIPE, scene.client
        self.process = scene.popen(client, argv, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0)
        self._version = version

    def check(self) -> None:
        """Raise Broken if it has ended."""
        require_running(self.process, "curl")

    def wait(self) -> None:
        """Wait for its end, which has to be a good one."""
        code = self.process.wait(END_S)
        words = self.process.stderr.read().decode() if self.process.stderr else ""
        require_equal("curl's exit code and words", (code, words), (0, f"{self._version} 200 1"))

    def close(self) -> None:
        """End it by force if it still runs."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None and not pipe.closed:
                pipe.close()


class Download:
    """curl receives; the server ends the file when it is told to."""

    def __init__(self, web: Server, curl: Curl, seen_from: str) -> None:
        self._server = web
        self._curl = curl
        self._seen_from = seen_from
        if curl.process.stdout is None:
            raise ValueError("curl's output has to be a pipe")
        self.sink = Sink(curl.process.stdout)
        wait_until(lambda: len(self.sink.arrivals.sizes) > 0, "the download begins")

    def check(self) -> None:
        """Raise Broken if curl has ended."""
        self._curl.check()

    def roamed(self, roam: Roam) -> None:
        """Nothing to do."""

    def finish(self, roams: Sequence[Roam]) -> Figures:
        """The server ends the file; checksums and source address have to be right."""
        self.check()
        self._server.end_downloads()
        self._curl.wait()
        self.sink.join(END_S)
        served, arrivals = self._server.served(), self.sink.arrivals
        require_equal("checksum", self.sink.digest.hexdigest(), served["sha256"])
        _require_one_request(self._server, self._seen_from)
        seconds = (arrivals.times_ns[-1] - arrivals.times_ns[0]) / 1e9
        size = {"bytes": served["bytes"], "mbit_s": rate_mbit(served["bytes"], seconds)}
        return {**size, **interruptions(arrivals, roams)}

    def close(self) -> None:
        """End everything."""
        self._curl.close()
        self.sink.join(END_S)


class Upload:
    """curl sends what it is given until there is no more."""

    def __init__(self, web: Server, curl: Curl, rate_mbit: float, seen_from: str) -> None:
        self._server = web
        self._curl = curl
        self._seen_from = seen_from
        if curl.process.stdin is None:
            raise ValueError("curl's input has to be a pipe")
        self._source = Source(curl.process.stdin, rate_mbit)
        self._started = time.monotonic()
        wait_until(lambda: web.requests() != [], "the upload begins")

    def check(self) -> None:
        """Raise Broken if curl has ended."""
        self._curl.check()

    def roamed(self, roam: Roam) -> None:
        """Nothing to do."""

    def finish(self, roams: Sequence[Roam]) -> Figures:
        """End the file; checksums and source address have to be right."""
        self.check()
        self._source.ended.set()
        self._source.join(END_S)
        seconds = time.monotonic() - self._started
        self._curl.wait()
        served = self._server.served()
        require_equal("checksum", served["sha256"], self._source.digest.hexdigest())
        _require_one_request(self._server, self._seen_from)
        return {"bytes": served["bytes"], "mbit_s": rate_mbit(served["bytes"], seconds)}

    def close(self) -> None:
        """End everything."""
        self._source.ended.set()
        self._curl.close()
        self._source.join(END_S)


def _require_one_request(web: Server, client: str) -> None:
    seen = [request["client"] for request in web.requests()]
    require_equal("the addresses that requests came from", seen, [client])


@contextlib.contextmanager
def download(scene: Scene, version: str, rate_mbit: float = 20.0) -> Iterator[Download]:
    """A download by curl from the web server, by this version of HTTP."""
    with server(scene, rate_mbit) as web:
        where = f"{SERVER}:{web.port}"
        with download_from(scene, web, version, where, scene.anchor()) as transfer:
            yield transfer


@contextlib.contextmanager
def download_from(
    scene: Scene, web: Server, version: str, where: str, seen_from: str
) -> Iterator[Download]:
    """A download by curl from `where` (host:port), which leads to the web server."""
    trust = ("--cacert", str(web.certificate))
    curl = Curl(scene, version, f"https://{where}/content", *trust)
    with contextlib.ExitStack() as stack:
        stack.callback(curl.close)
        transfer = Download(web, curl, seen_from)
        stack.callback(transfer.close)
        yield transfer


@contextlib.contextmanager
def upload(scene: Scene, version: str, rate_mbit: float = 20.0) -> Iterator[Upload]:
    """An upload by curl to the web server, by this version of HTTP."""
    with server(scene, 0) as web, contextlib.ExitStack() as stack:
        options = ("--cacert", str(web.certificate), "--upload-file", "-")
        curl = Curl(scene, version, f"https://{SERVER}:{web.port}/content", *options)
        stack.callback(curl.close)
        transfer = Upload(web, curl, rate_mbit, scene.anchor())
        stack.callback(transfer.close)
        yield transfer
