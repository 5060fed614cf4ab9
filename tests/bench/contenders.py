"""What is compared: the same lab, its flows replicated by apagent or by conntrackd.

Both have the client at ap1, which opens the flows; every other AP should come to know them.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from pathlib import Path
from typing import Protocol, Self

from apagent.lab import namespaces
from apagent.lab.errors import LabError
from apagent.lab.lab import Lab
from apagent.lab.place import Place
from apagent.lab.plan import INTERNET, SERVER_ADDRESS
from tests.bench.load import REMOTES
from tests.bench.sets import MapSize

CLIENT, ANCHOR = "client1", "ap1"
_TIMEOUT_S = 3600
_TIMEOUTS = ("udp_timeout", "udp_timeout_stream", "tcp_timeout_syn_sent")
_PATIENCE_S = 20.0


class Contender(Protocol):
    """A lab with something in it that replicates flows."""

    name: str
    lab: Lab

    @property
    def sender(self) -> int:
        """Process id at the anchor."""

    @property
    def receivers(self) -> tuple[int, ...]:
        """Process ids at the other APs."""

    def replicated(self) -> int:
        """How many flows the kernel of every other AP holds at least."""

    def losses(self) -> int:
        """How often anything was lost on the way, as the programs themselves say."""


def prepare(lab: Lab) -> None:
    """What every contender's lab needs: flows that stay, and a network that swallows the load."""
    for ap in lab.aps:
        with namespaces.inside(lab.namespace(ap)):
            for timeout in _TIMEOUTS:
                namespaces.set_sysctl(f"netfilter/nf_conntrack_{timeout}", _TIMEOUT_S)
    lab.run(INTERNET, ["ip", "route", "add", "blackhole", REMOTES])
    lab.run(CLIENT, ["ping", "-c", "1", "-W", "2", str(SERVER_ADDRESS)])


class Apagent:
    """A lab whose APs run apagent."""

    name = "apagent"

    def __init__(self, aps: int = 2, place: Place | None = None, *, takeover: bool = False) -> None:
        self.lab = Lab(aps, 1, place=place, takeover=takeover)
        self._maps: list[MapSize] = []

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            undo.callback(self.lab.down)
            self.lab.up()
            prepare(self.lab)
            self._maps = [MapSize(self.lab.namespace(ap)) for ap in self.lab.aps[1:]]
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._maps:
            one.close()
        self.lab.down()

    @property
    def sender(self) -> int:
        """Process id at the anchor."""
        return self.lab.agent_pid(ANCHOR)

    @property
    def receivers(self) -> tuple[int, ...]:
        """Process ids at the other APs."""
        return tuple(self.lab.agent_pid(ap) for ap in self.lab.aps[1:])

    def replicated(self) -> int:
        """How many flows every other AP's map holds at least."""
        return min(one.read() for one in self._maps)

    def losses(self) -> int:
        """Tables that were read again, since conntrack events were lost."""
        return sum(int(self.lab.apctl(ap, "status")["resyncs"]) for ap in self.lab.aps)


class Conntrackd:
    """A lab of two APs that run conntrackd: FTFW, straight into the other's kernel."""

    name = "conntrackd"

    def __init__(self, place: Place | None = None) -> None:
        self.lab = Lab(2, 1, agents=False, place=place)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._before = 0

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            undo.callback(self.__exit__)
            self.lab.up()
            for ap in self.lab.aps:
                self._start(ap)
            for ap in self.lab.aps:
                self._wait(ap)
            prepare(self.lab)
            time.sleep(1.0)
            self._before = self._count()
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_PATIENCE_S)
        self.lab.down()

    @property
    def sender(self) -> int:
        """Process id at the anchor."""
        return self._processes[ANCHOR].pid

    @property
    def receivers(self) -> tuple[int, ...]:
        """Process id at the other AP."""
        return (self._processes["ap2"].pid,)

    def replicated(self) -> int:
        """How many entries the other AP's conntrack table holds."""
        return self._count() - self._before

    def losses(self) -> int:
        """Overruns of netlink at the anchor, and messages that the other one missed."""
        overruns = self._statistic(ANCHOR, "runtime", "netlink overrun:")
        return overruns + self._statistic("ap2", "network", "Packets lost:")

    def _statistic(self, ap: str, about: str, name: str) -> int:
        file = self.lab.place.ap_directory(ap) / "conntrackd.conf"
        text = self.lab.run(ap, ["conntrackd", "-C", str(file), "-s", about]).stdout
        line = next(line for line in text.splitlines() if line.strip().startswith(name))
        return int(line.partition(":")[2])

    def _count(self) -> int:
        with namespaces.inside(self.lab.namespace("ap2")):
            return int(Path("/proc/sys/net/netfilter/nf_conntrack_count").read_text("ascii"))

    def _start(self, ap: str) -> None:
        directory = self.lab.place.ap_directory(ap)
        directory.mkdir(exist_ok=True)
        file = directory / "conntrackd.conf"
        file.write_text(self._configuration(ap, directory), encoding="ascii")
        with (directory / "conntrackd.out").open("wb") as output:
            self._processes[ap] = self.lab.popen(
                ap, ["conntrackd", "-C", str(file)], stdout=output, stderr=output
            )

    def _wait(self, ap: str) -> None:
        socket = self.lab.place.ap_directory(ap) / "conntrackd.ctl"
        deadline = time.monotonic() + _PATIENCE_S
        while not socket.exists():
            if time.monotonic() > deadline or self._processes[ap].poll() is not None:
                output = (socket.parent / "conntrackd.out").read_text(errors="replace")
                raise LabError(f"conntrackd doesn't start on {ap}: {output}")
            time.sleep(0.05)

    def _configuration(self, ap: str, directory: Path) -> str:
        """The FTFW example of its documentation, with buffers that suit the load."""
        (other,) = (name for name in self.lab.aps if name != ap)
        plan = self.lab.plan
        return f"""
Sync {{
    Mode FTFW {{
        DisableExternalCache on
        ResendQueueSize 262144
    }}
    UDP {{
        IPv4_address {plan.underlay(ap)}
        IPv4_Destination_Address {plan.underlay(other)}
        Port 3780
        Interface bh
        SndSocketBuffer 8388608
        RcvSocketBuffer 8388608
        Checksum on
    }}
}}
General {{
    HashSize 65536
    HashLimit 524288
    LogFile {directory}/conntrackd.log
    LockFile {directory}/conntrackd.lock
    UNIX {{
        Path {directory}/conntrackd.ctl
    }}
    NetlinkBufferSize 8388608
    NetlinkBufferSizeMaxGrowth 16777216
    Filter From Kernelspace {{
        Protocol Accept {{
            TCP
            UDP
            ICMP
        }}
        Address Ignore {{
            IPv4_address 127.0.0.1
            IPv4_address {plan.underlay(ap)}
        }}
    }}
}}
"""
