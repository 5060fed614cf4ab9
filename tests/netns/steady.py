"""Traffic of one client that goes on for a whole module of tests, and what each of them cost it.

A TCP connection (a line and its echo), a UDP socket and a ping make a set of flows. All of them
are asked a hundred times a second, by a thread of its own.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from apagent.lab import namespaces
from apagent.lab.lab import Lab
from apagent.lab.traffic import ECHO_PORT, LINES_PORT
from apagent.lab.traffic.datagram import read_answer, request
from tests.netns.observe import SERVER

INTERVAL_S = 0.01
ANSWER_S = 0.3
"""How long an answer may take; later it counts as lost."""
_ECHO_REQUEST = 8
_ICMP = struct.Struct(">BBHHHQ")
_IP_HEADER = 20


@dataclass(slots=True)
class Asked:
    """Sequence numbers of one flow: when each was sent, and which were answered."""

    sent: list[float] = field(default_factory=list)
    answered: set[int] = field(default_factory=set)
    ended: str = ""
    """Why nothing can be asked any more."""

    def lost(self, since: float, until: float) -> int:
        """How many that were sent in this time got no answer."""
        return sum(
            since <= sent < until and number not in self.answered
            for number, sent in enumerate(self.sent)
        )


class _Udp:
    name = "udp"

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.connect((SERVER, ECHO_PORT))

    def ask(self, number: int) -> None:
        self.socket.send(request(number))

    def read(self) -> list[int]:
        answer = read_answer(self.socket.recv(2048))
        return [] if answer is None else [answer[0]]


class _Ping:
    name = "icmp"

    def __init__(self, identifier: int) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        self.socket.connect((SERVER, 0))
        self._identifier = identifier

    def ask(self, number: int) -> None:
        head = (_ECHO_REQUEST, 0, 0, self._identifier, number & 0xFFFF, number)
        sum_ = sum(struct.unpack(">8H", _ICMP.pack(*head)))
        checksum = ~((sum_ & 0xFFFF) + (sum_ >> 16)) & 0xFFFF
        self.socket.send(_ICMP.pack(*head[:2], checksum, *head[3:]))

    def read(self) -> list[int]:
        data = self.socket.recv(2048)[_IP_HEADER:]
        if len(data) != _ICMP.size:
            return []
        type_, _, _, identifier, _, number = _ICMP.unpack(data)
        return [number] if (type_, identifier) == (0, self._identifier) else []


class _Tcp:
    name = "tcp"

    def __init__(self) -> None:
        self.socket = socket.create_connection((SERVER, LINES_PORT), 5.0)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._rest = b""

    def ask(self, number: int) -> None:
        self.socket.send(b"%d\n" % number)

    def read(self) -> list[int]:
        data = self.socket.recv(4096)
        if not data:
            raise ConnectionResetError("the server closed the connection")
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [int(line) for line in lines if line.isdigit()]  # the first one is a greeting


Flow = _Udp | _Ping | _Tcp


class Steady:
    """Flows that are asked all the time. `add` opens a set of them where the client is now."""

    def __init__(self, lab: Lab, client: str) -> None:
        self._namespace = lab.namespace(client)
        self._flows: dict[str, Flow] = {}
        self.asked: dict[str, Asked] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="steady traffic", daemon=True)
        self._thread.start()

    def add(self, label: str) -> None:
        """Open a TCP connection, a UDP socket and a ping, to be known by `label`."""
        with namespaces.inside(self._namespace):
            opened: list[Flow] = [_Tcp(), _Udp(), _Ping(1 + len(self._flows))]
        with self._lock:
            for flow in opened:
                flow.socket.setblocking(False)
                self._flows[f"{flow.name} {label}"] = flow
                self.asked[f"{flow.name} {label}"] = Asked()

    def lost(self, since: float, until: float) -> dict[str, int]:
        """What was asked in this time (time.monotonic) in vain, by flow."""
        with self._lock:
            return {name: asked.lost(since, until) for name, asked in self.asked.items()}

    def lately_lost(self) -> dict[str, int]:
        """What was asked in vain in the last moments whose answers can be here by now."""
        now = time.monotonic()
        return self.lost(now - ANSWER_S - 0.2, now - ANSWER_S)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Ask nothing for the length of the block; what has been asked is answered by then."""
        with self._lock:
            time.sleep(ANSWER_S)
            yield

    def ended(self) -> dict[str, str]:
        """The flows that are at their end, and why."""
        with self._lock:
            return {name: asked.ended for name, asked in self.asked.items() if asked.ended}

    def close(self) -> None:
        """End it all."""
        self._stopped.set()
        self._thread.join()
        for flow in self._flows.values():
            flow.socket.close()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stopped.wait(max(0.0, due - time.monotonic())):
            due = max(due + INTERVAL_S, time.monotonic())
            with self._lock:
                for name, flow in self._flows.items():
                    _turn(flow, self.asked[name])


def _turn(flow: Flow, asked: Asked) -> None:
    """Take in what has been answered, and ask again."""
    if asked.ended:
        return
    try:
        with contextlib.suppress(BlockingIOError):
            while True:
                asked.answered.update(flow.read())
        asked.sent.append(time.monotonic())
        flow.ask(len(asked.sent) - 1)
    except (BlockingIOError, InterruptedError):
        return
    except OSError as error:
        # An ICMP error to a datagram is a loss like any other.
        if isinstance(flow, _Tcp):
            asked.ended = str(error)


@contextlib.contextmanager
def steady(lab: Lab, client: str) -> Iterator[Steady]:
    """Traffic for the length of the block."""
    made = Steady(lab, client)
    try:
        yield made
    finally:
        made.close()
