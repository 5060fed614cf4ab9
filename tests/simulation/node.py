"""One AP: a kernel, and an agent on it that may die at any moment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain

from apagent.core.desired import NetworkState, difference
from apagent.core.domain import Domain
from apagent.core.effects import (
    AdoptFlows,
    AskClient,
    DefendAddress,
    Effect,
    EndFlows,
    ForgetClient,
    NoteSync,
    ProbeAddress,
    Publish,
    WelcomeClient,
)
from apagent.core.engine import Engine
from apagent.core.events import Event, FlowsListed, KernelAdopted, SyncTimedOut
from apagent.core.feed import FeedContents, FeedLog
from apagent.core.model import FlowKey, Mac, NatAddress, NetworkName, socket_of
from apagent.peers.publisher import SharedDeltas
from tests.simulation.kernel import GRACE_S, Kernel
from tests.simulation.scenario import Violation
from tests.simulation.segment import Segment

NEVER = -1


@dataclass
class Agent:
    """One run of the agent."""

    engine: Engine
    feed: FeedLog
    deltas: SharedDeltas
    sync_deadline: float
    timed_out: bool = False
    draining: bool = False
    asked: dict[NatAddress, Mac | None] = field(default_factory=dict)
    """NAT addresses that the segment was asked for -> who has answered."""
    done: list[Event] = field(default_factory=list)
    """What has come of the agent's work with anchors: it learns of it in its own time."""


class Node:
    """An AP. `now` is the world's clock; the AP's own is `offset` seconds off."""

    def __init__(
        self,
        domain: Domain,
        kernel: Kernel,
        capacity: int,
        now: Callable[[], float],
        end_flow: Callable[[Node, NetworkName, FlowKey], None],
        ask: Callable[[Node, NetworkName, Mac], None],
        segment: Segment,
    ) -> None:
        self.id = domain.me.id
        self.domain = domain
        self.kernel = kernel
        self.agent: Agent | None = None
        self.powered = True
        self.offset = 0.0
        self.crash_after = NEVER
        """Effects that the agent still carries out of its next batch before it dies."""
        self._capacity = capacity
        self._now = now
        self._end_flow = end_flow
        self._ask = ask
        self._segment = segment

    @property
    def engine(self) -> Engine:
        """The engine of the agent, which must be running."""
        assert self.agent is not None
        return self.agent.engine

    @property
    def ready(self) -> bool:
        """Whether the kernel has events for the agent."""
        if self.agent is None:
            return False
        waits = self.kernel.conntrack.waits or bool(self.kernel.bridge.waiting)
        return waits or bool(self.agent.done or self.agent.asked)

    def start(self, epoch: int) -> None:
        """Start an agent as `agent.Agent.adopt` does."""
        kernel = self.kernel
        if kernel.fresh:
            kernel.held_until = self._now() + self.domain.sync_timeout_s
            kernel.fresh = False
        engine = Engine(self.domain)
        feed = FeedLog(epoch, lambda: contents(engine), self._capacity)
        deadline = self._now() + self.domain.sync_timeout_s
        self.agent = Agent(engine, feed, SharedDeltas(self.id), deadline)
        kernel.listen(on=True)
        installed = kernel.copy()
        self.work_off(self._adopted(installed), lambda: self._align(engine, installed))
        if self.agent is not None:
            self._check_adoption(installed)

    def stop(self) -> None:
        """The agent dies; the kernel goes on."""
        self.agent = None
        self.crash_after = NEVER
        self.kernel.listen(on=False)

    def reboot(self) -> None:
        """The whole AP starts anew; its agent is not up yet."""
        self.stop()
        self.kernel.reboot()

    def list_clients(self) -> None:
        """The kernel's events on clients were lost; the agent reads the tables instead."""
        if self.agent is not None:
            tables = self.engine.clients.items()
            ours = {(n, c.claim.mac) for n, t in tables for c in t if c.claim.ap == self.id}
            bridge = self.kernel.bridge
            bridge.waiting = []
            self.work_off([*bridge.dump(), *bridge.aged(ours)])

    def read(self, *, flows: bool = True, clients: bool = True) -> list[Event]:
        """Take the kernel's events as the agent does."""
        events: list[Event] = []
        if flows:
            changes = self.kernel.conntrack.read()
            events += [FlowsListed(self.kernel.conntrack.dump())] if changes is None else changes
        if clients:
            events += self.kernel.bridge.read()
        if self.agent is not None:
            events += self.agent.done
            events += self._segment.conclude(self)
            self.agent.done = []
        return events

    def tick(self) -> None:
        """Time has passed."""
        agent = self.agent
        if agent is not None and not agent.timed_out and self._now() >= agent.sync_deadline:
            self.time_out()

    def time_out(self) -> None:
        """The agent waits no longer for silent peers."""
        if self.agent is not None:
            self.agent.timed_out = True
            self.work_off([SyncTimedOut()])

    def work_off(self, events: list[Event], install: Callable[[], object] | None = None) -> None:
        """One batch, as `shell.Shell` does it: the engine, the kernel, then the effects."""
        if self.agent is None or not events:
            return None
        engine, now = self.agent.engine, self._now() + self.offset
        effects = list(chain.from_iterable(engine.step(event, now) for event in events))
        crash_after, self.crash_after = self.crash_after, NEVER
        if crash_after == 0:
            return self.stop()
        before = self.kernel.copy_addresses()
        if install is None:
            self.kernel.apply(engine.take_deltas())
        else:
            install()
        self._segment.announce_new(self, before)
        effects.sort(key=lambda effect: not isinstance(effect, Publish))
        for effect in effects[: crash_after - 1 if crash_after > 0 else None]:
            self._carry_out(effect)
        if crash_after > 0:
            self.stop()
        return None

    def _carry_out(self, effect: Effect) -> None:
        assert self.agent is not None
        match effect:
            case Publish():
                self.agent.feed.append(effect.tables, effect.claims, effect.clock, effect.anchor)
            case WelcomeClient():
                for address in effect.addresses:
                    self.kernel.grace[effect.network, address] = self._now() + GRACE_S
            case ForgetClient():
                self.kernel.bridge.forget(effect.network, effect.mac, effect.addresses)
            case AskClient():
                self._ask(self, effect.network, effect.mac)
            case EndFlows():
                for key in effect.flows:
                    self._end_flow(self, effect.network, key)
            case ProbeAddress() | DefendAddress() | AdoptFlows():
                self._segment.carry_out(self, effect)
            case NoteSync():
                self.kernel.held_until = 0.0

    def _adopted(self, installed: Mapping[NetworkName, NetworkState]) -> list[Event]:
        events: list[Event] = [FlowsListed(self.kernel.conntrack.dump())]
        for name, state in installed.items():
            events.append(
                KernelAdopted(
                    name,
                    state.flows,
                    state.routes,
                    state.neighbours,
                    frozenset(state.addresses),
                    state.sockets,
                    state.elsewhere,
                    state.forwards,
                )
            )
        ours = {(n, mac) for n, state in installed.items() for mac in state.neighbours.values()}
        return [*events, *self.kernel.bridge.found(), *self.kernel.bridge.aged(ours)]

    def _align(self, engine: Engine, actual: Mapping[NetworkName, NetworkState]) -> None:
        engine.take_deltas()
        wanted = engine.wanted()
        self.kernel.apply({name: difference(actual[name], wanted[name]) for name in wanted})

    def _check_adoption(self, before: Mapping[NetworkName, NetworkState]) -> None:
        """A start changes nothing that is forwarded. Raises Violation."""
        for name, state in self.kernel.installed.items():
            own = self.kernel.conntrack.tables[name]
            sockets = {socket_of(key) for key in (*own, *self.engine.sessions[name].table(self.id))}
            for what, kept in (
                ("flows", before[name].flows.items() - state.flows.items()),
                # With two anchors, the one that doesn't answer isn't known any more.
                ("sockets", before[name].sockets.items() - state.sockets.items()),
                ("routes", before[name].routes.items() - state.routes.items()),
                ("neighbours", before[name].neighbours.items() - state.neighbours.items()),
                ("forwards", before[name].forwards.items() - state.forwards.items()),
            ):
                ours = {*own, *sockets, *state.neighbours, *state.sockets}
                gone = [key for key, value in kept if key not in ours and value != self.id]
                if gone:
                    raise Violation(f"{self.id}: its agent's start has removed {what} {gone}")


def contents(engine: Engine) -> FeedContents:
    """What the engine's feed says now, as `app.py` puts it together."""
    tables, claims = engine.snapshot()
    anchor = engine.anchoring.book.statement()
    return FeedContents(tables, claims, engine.clock, anchor, engine.digests(engine.me))
