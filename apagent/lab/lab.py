"""The lab as an object: bring it up, let clients roam, run programs in its nodes, take it down."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from apagent.lab import build, namespaces, nat, processes, programs, state
from apagent.lab.agents import Agents
from apagent.lab.capture import Capture, touching
from apagent.lab.errors import LabError
from apagent.lab.place import Place
from apagent.lab.plan import CLIENT_ADDRESSES, INTERNET, UPLINK, plan
from apagent.lab.radio import Radio

Progress = Callable[[str], None]

_APCTL_OK, _APCTL_DEGRADED = 0, 4
_APCTL_TIMEOUT_S = 15.0


def silent(text: str) -> None:
    """No progress report."""


class Lab:
    """A roam domain of `aps` APs and `clients` clients in network namespaces.

    A context manager: up at the start, down at the end. With `agents`, every AP runs apagent; else
    it does its own NAT the ordinary way. Clients belong to `networks` networks in turn;
    as `twins` these have the same addresses. With `takeover` the first network's NAT addresses can
    move to other APs. `options`
    are lines to add to the first network in the configuration of an AP; they are not kept for
    `open`. `progress` is told what happens, a line each.
    """

    def __init__(  # noqa: PLR0913 - settings, by name
        self,
        aps: int = 3,
        clients: int = 2,
        *,
        agents: bool = True,
        networks: int = 1,
        twins: bool = False,
        takeover: bool = False,
        options: Mapping[str, str] | None = None,
        place: Place | None = None,
        progress: Progress = silent,
    ) -> None:
        self.plan = plan(aps, clients, networks, twins=twins)
        self.place = Place.from_environment(os.environ) if place is None else place
        self._state = state.State(
            aps, clients, agents, networks=networks, twins=twins, takeover=takeover
        )
        self._progress = progress
        self.agents = Agents(self.place, self.plan, options or {}, takeover=takeover)
        self._radio: Radio | None = None

    @classmethod
    def open(cls, place: Place) -> Lab:
        """The lab that another run brought up. Raises LabNotUp if there is none."""
        found = state.load(place)
        lab = cls(
            found.aps,
            found.clients,
            agents=found.agents,
            networks=found.networks,
            twins=found.twins,
            takeover=found.takeover,
            place=place,
        )
        lab._state = found
        return lab

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(
        self,
        type_: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.down()

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes."""
        return [node.name for node in self.plan.nodes]

    @property
    def aps(self) -> tuple[str, ...]:
        """Names of the APs."""
        return self.plan.aps

    @property
    def clients(self) -> tuple[str, ...]:
        """Names of the clients."""
        return self.plan.clients

    @property
    def has_agents(self) -> bool:
        """Whether the APs run apagent."""
        return self._state.agents

    @property
    def phase(self) -> str:
        """`building` until everything is made, then `up`."""
        return self._state.phase

    def up(self) -> None:
        """Build everything and wait until every agent is in sync.

        Raises LabError if there is a lab already. After any other error, and after Ctrl-C, what was
        made is taken down again.
        """
        left = _namespaces(self.place)
        if left and not state.exists(self.place):
            raise LabError(
                f"namespaces of another lab are there ({', '.join(left)}); `apagent lab down` "
                "removes them, or choose another APAGENT_LAB_PREFIX"
            )
        state.claim(self.place, self._state)
        try:
            self._build()
        except BaseException:
            self._progress("interrupted or failed: taking down what was made")
            self.down()
            raise
        self._state = replace(self._state, phase=state.UP)
        state.record(self.place, self._state)

    def _build(self) -> None:
        size = f"{_plural(len(self.aps), 'AP')}, {_plural(len(self.clients), 'client')}"
        self._progress(f"building the network: {size}")
        build.make(self.place, self.plan)
        if self.has_agents:
            self._start_agents()
            return
        for ap in self.aps:
            with namespaces.inside(self.place.namespace(ap)):
                nat.translate(UPLINK)

    def _start_agents(self) -> None:
        self._progress(f"starting apagent on {', '.join(self.aps)}")
        for ap in self.aps:
            self.agents.prepare(ap)
            self.agents.start(ap)
        self._progress("waiting until every agent is in sync")
        self.agents.wait_ready(self.aps)

    def down(self) -> None:
        """Take down whatever there is of a lab at this place; nothing: nothing to do.

        Every process in the lab's namespaces is ended. Raises LabError.
        """
        self.close()
        self.agents.close()
        take_down(self.place, self._progress)
        self.agents.close()

    def close(self) -> None:
        """Close the sockets; the lab stays up."""
        if self._radio is not None:
            self._radio.close()
            self._radio = None

    def roam(self, client: str, ap: str, *, silent: bool = False, carrier: bool = False) -> int:
        """Associate a client with an AP; returns when the link was up there (CLOCK_MONOTONIC, ns).

        `silent` leaves the AP's Layer 2 Update frame out, `carrier` takes the client's carrier down
        and up. Nobody else is told.
        """
        return self._air.roam(client, ap, silent=silent, carrier=carrier)

    def location(self, client: str) -> str:
        """The AP that a client is associated with."""
        return self._air.location(client)

    def locations(self) -> dict[str, str | None]:
        """All clients, and the AP that each is associated with."""
        return self._air.locations()

    def popen(self, node: str, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:  # noqa: ANN401 - Popen's own
        """Start a program in a node; `options` are subprocess.Popen's."""
        environment = options.pop("env", None) or self.environment(node)
        return programs.start(self.namespace(node), argv, env=environment, **options)

    def run(
        self, node: str, argv: Sequence[str], *, check: bool = True, timeout: float = 30.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in a node to its end (seconds), with its output as text.

        Raises LabError if it takes longer, or with `check` if it fails.
        """
        with self.popen(
            node, argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                output, errors = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                output, errors = process.communicate()
                raise LabError(f"{_call(node, argv)} takes over {timeout} s: {errors}") from None
            except BaseException:
                process.kill()
                raise
        if check and process.returncode != 0:
            raise LabError(f"{_call(node, argv)} ended with {process.returncode}: {errors}{output}")
        return subprocess.CompletedProcess(list(argv), process.returncode, output, errors)

    def replace_by(self, node: str, argv: Sequence[str]) -> None:
        """Become a program in a node; doesn't return. Raises LabError."""
        environment = self.environment(node)
        namespaces.enter(self.namespace(node))
        try:
            os.execvpe(argv[0], list(argv), environment)  # noqa: S606 - no shell is wanted
        except OSError as error:
            raise LabError(f"{argv[0]} can't be started: {error.strerror}") from error

    def namespace(self, node: str) -> str:
        """Name of a node's namespace. Raises UnknownNode."""
        return self.place.namespace(self.plan.node(node).name)

    def environment(self, node: str) -> dict[str, str]:
        """What programs in a node find in their environment. Raises UnknownNode."""
        is_ap = self.plan.node(node).kind == "ap"
        return programs.environment(self.place.control_socket(node) if is_ap else None)

    def apctl(self, ap: str, *arguments: str) -> Any:  # noqa: ANN401 - JSON
        """What `apctl ARGUMENTS -o json` says of the AP's agent, parsed. Raises LabError."""
        self.plan.ap(ap)
        argv = [programs.path("apctl"), *arguments, "-o", "json"]
        result = self.run(ap, argv, check=False, timeout=_APCTL_TIMEOUT_S)
        if result.returncode not in (_APCTL_OK, _APCTL_DEGRADED):
            raise LabError(f"{_call(ap, argv)} ended with {result.returncode}: {result.stderr}")
        return json.loads(result.stdout)

    def agent_pid(self, ap: str) -> int:
        """Process id of the AP's agent. Raises LabError if it doesn't run."""
        return self.agents.pid(ap)

    def kill_agent(self, ap: str, number: int = signal.SIGKILL, *, timeout: float = 10.0) -> None:
        """Send a signal that ends the AP's agent, and wait for its end (seconds)."""
        self.agents.kill(ap, number)
        self.agents.wait_ended(ap, timeout)

    def start_agent(self, ap: str) -> None:
        """Start the AP's agent again and wait until it is in sync. Raises LabError."""
        self.agents.prepare(self.plan.ap(ap))
        self.agents.start(ap)
        self.agents.wait_ready([ap])

    def watch_for_leaks(self) -> Capture:
        """Watch every uplink, at the router, for packets from or to a client's own address."""
        uplinks = [end.name for end in self.plan.on(INTERNET) if end.name in self.aps]
        return Capture(self.namespace(INTERNET), uplinks, touching(CLIENT_ADDRESSES))

    @property
    def _air(self) -> Radio:
        if self._radio is None:
            self._radio = Radio(self.place, self.plan)
        return self._radio


def take_down(place: Place, progress: Progress = silent) -> None:
    """Remove what is left of a lab at this place, by its namespaces and its state directory.

    Idempotent; also clears what an interrupted or killed `up` left. Raises LabError.
    """
    left = _namespaces(place)
    if left:
        progress(f"removing {_plural(len(left), 'namespace')} and what runs inside")
    identities = set()
    for name in left:
        with contextlib.suppress(FileNotFoundError):
            identities.add(namespaces.identity(name))
    processes.stop(processes.in_namespaces(identities), patience_s=5.0)
    for name in left:
        namespaces.remove(name)
    state.forget(place)


def _namespaces(place: Place) -> list[str]:
    return [name for name in namespaces.names() if place.owns(name)]


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _call(node: str, argv: Sequence[str]) -> str:
    return f"{' '.join(argv)} on {node}"
