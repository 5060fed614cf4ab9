"""The agents of a lab's APs: their configuration, their start, and when they are ready."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import textwrap
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from apagent.lab import programs
from apagent.lab.errors import LabError
from apagent.lab.place import Place
from apagent.lab.plan import UPLINK, ClientNetwork, Plan
from apagent.lab.processes import Process

READY_TIMEOUT_S = 20.0
_LOG_TAIL_LINES = 25
_PEERING_PORT = 7411


def configuration(
    place: Place, plan: Plan, ap: str, options: str = "", *, takeover: bool = False
) -> str:
    """The configuration file of an AP, as a person would write it.

    `options` are lines to add to its first network. With `takeover`, that network has a NAT address
    that other APs can take over.
    """
    peers = "".join(_peer(plan, peer) for peer in plan.aps if peer != ap)
    nat = str(plan.nat_address(ap)) if takeover else ""
    first, *others = (
        _network(network, nat if i == 0 else "") for i, network in enumerate(plan.networks)
    )
    networks = "".join((first, options, *others))
    return f'''# apagent on {ap}, an access point of the lab.

[ap]
id = "{ap}"

[tunnel]
underlay = "{plan.underlay(ap)}"          # our address on the network between the APs

[peering]
listen = "{plan.underlay(ap)}:{_PEERING_PORT}"       # the other APs subscribe to our sessions here
{peers}
# The networks that clients roam in: the same on every AP.{networks}
[control]
socket = "{place.control_socket(ap)}"
'''


def _network(network: ClientNetwork, nat: str) -> str:
    lines = f'''
[[networks]]
name = "{network.name}"
client_interface = "{network.client_interface}"
prefix = "{network.prefix}"
gateway = "{network.gateway}"
vni = {network.vni}                        # of the tunnel, the same on every AP
uplink = "{UPLINK}"
nat = "{nat or "masquerade"}"              # or the address to translate to
'''
    if nat:
        lines += "takeover = true                 # another AP takes it over if this one dies\n"
    if network.zone:
        lines += (
            f"zone = {network.zone}                        # another network has its addresses\n"
        )
    return lines


def _peer(plan: Plan, ap: str) -> str:
    underlay = plan.underlay(ap)
    return f'''
[[peers]]
id = "{ap}"
address = "{underlay}:{_PEERING_PORT}"
underlay = "{underlay}"
'''


class Agents:
    """Starts, finds and stops the agents of a lab, also those that another run started."""

    def __init__(
        self, place: Place, plan: Plan, options: Mapping[str, str], *, takeover: bool = False
    ) -> None:
        self.commands: dict[str, list[str]] = {}
        """Programs to run in the place of `apagent` on an AP."""
        self._place = place
        self._plan = plan
        self._options = options
        self._takeover = takeover
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._notifications: dict[str, socket.socket] = {}

    def prepare(self, ap: str) -> None:
        """Make the AP's directory and write its configuration."""
        self._place.ap_directory(ap).mkdir(exist_ok=True)
        options = self._options.get(ap, "")
        text = configuration(self._place, self._plan, ap, options, takeover=self._takeover)
        self.config_file(ap).write_text(text, encoding="utf-8")

    def start(self, ap: str) -> None:
        """Start the AP's agent; `wait_ready` tells when it works. Raises LabError."""
        if self.process(ap) is not None:
            raise LabError(f"the agent of {ap} runs already")
        self._reap(ap)
        self._notifications[ap] = self._listen(ap)
        command = self.commands.get(ap, [programs.path("apagent")])
        argv = [*command, "run", "--config", str(self.config_file(ap))]
        environment = programs.environment(self._place.control_socket(ap))
        environment["NOTIFY_SOCKET"] = str(self._notify_path(ap))
        with self.log(ap).open("ab") as log:
            child = programs.start(
                self._place.namespace(ap),
                argv,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C at `lab up` is not meant for the agents
            )
        self._children[ap] = child
        process = Process.of(child.pid)
        if process is not None:
            process.save(self._pid_file(ap))

    def wait_ready(self, aps: Iterable[str], timeout_s: float = READY_TIMEOUT_S) -> None:
        """Wait until the agents that we started report that clients may come.

        They say so as to a service manager (sd_notify(3): READY=1). Raises LabError with the end of
        the log if one ends or takes longer than `timeout_s` for all.
        """
        deadline = time.monotonic() + timeout_s
        for ap in aps:
            self._wait_ready(ap, deadline)

    def _wait_ready(self, ap: str, deadline: float) -> None:
        notifications = self._notifications[ap]
        notifications.settimeout(0.1)
        while time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                if b"READY=1" in notifications.recv(4096).split(b"\n"):
                    return
            if self.process(ap) is None:
                raise LabError(f"the agent of {ap} has ended{self._log_tail(ap)}")
        raise LabError(f"the agent of {ap} is not ready in time{self._log_tail(ap)}")

    def notifications(self, ap: str) -> socket.socket:
        """Where the AP's agent, which we started, tells how it is. Reading is up to the caller."""
        return self._notifications[ap]

    def process(self, ap: str) -> Process | None:
        """The AP's agent; None: it doesn't run."""
        process = Process.load(self._pid_file(ap))
        return process if process is not None and process.alive else None

    def pid(self, ap: str) -> int:
        """The agent's process id. Raises LabError if it doesn't run."""
        return self._running(ap).pid

    def kill(self, ap: str, number: int) -> None:
        """Send a signal to the AP's agent. Raises LabError if it doesn't run."""
        self._running(ap).signal(number)

    def wait_ended(self, ap: str, timeout_s: float) -> None:
        """Wait for the end of the AP's agent. Raises LabError if it takes longer."""
        process = Process.load(self._pid_file(ap))
        if process is not None and not process.wait(timeout_s):
            raise LabError(f"the agent of {ap} still runs after {timeout_s} s")
        self._reap(ap)

    def close(self) -> None:
        """Let go of what runs."""
        for ap in self._plan.aps:
            self._reap(ap)

    def config_file(self, ap: str) -> Path:
        """The AP's configuration file."""
        return self._place.ap_directory(ap) / "agent.toml"

    def log(self, ap: str) -> Path:
        """The log of the AP's agent, over all its runs."""
        return self._place.ap_directory(ap) / "agent.log"

    def log_end(self, ap: str, lines: int) -> str:
        """The last lines of the log; empty if there is none."""
        try:
            text = self.log(ap).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def _log_tail(self, ap: str) -> str:
        """The end of the log, to be added to an error text."""
        tail = self.log_end(ap, _LOG_TAIL_LINES)
        if not tail:
            return "; it has logged nothing"
        return f"; the end of its log {self.log(ap)}:\n{textwrap.indent(tail, '  ')}"

    def _running(self, ap: str) -> Process:
        process = self.process(self._plan.ap(ap))
        if process is None:
            raise LabError(f"the agent of {ap} doesn't run{self._log_tail(ap)}")
        return process

    def _listen(self, ap: str) -> socket.socket:
        self._notify_path(ap).unlink(missing_ok=True)
        notifications = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        notifications.bind(str(self._notify_path(ap)))
        return notifications

    def _reap(self, ap: str) -> None:
        """Take in the exit code of a child that has ended, and close its socket."""
        notifications = self._notifications.pop(ap, None)
        if notifications is not None:
            notifications.close()
        child = self._children.pop(ap, None)
        if child is not None and child.poll() is None:
            self._children[ap] = child

    def _pid_file(self, ap: str) -> Path:
        return self._place.ap_directory(ap) / "agent.pid"

    def _notify_path(self, ap: str) -> Path:
        return self._place.ap_directory(ap) / "notify.sock"
