"""The shell around the engine: it takes events in, and carries effects and kernel changes out.

Everything runs on one event loop. Sources call `emit`; what they emit within one turn of the loop
is one batch: the engine takes all of it, then the kernel is changed, then the peers are told, then
the log and the observers. So a roam installs the neighbour entry, moves the host route and is
announced in one step.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial

from apagent.core.effects import (
    AskClient,
    Effect,
    EndFlows,
    ForgetClient,
    NoteAnchor,
    NotePeer,
    NoteRoam,
    NoteSync,
    Publish,
    WelcomeClient,
)
from apagent.core.engine import Engine
from apagent.core.events import Event
from apagent.core.feed import FeedLog
from apagent.errors import KernelFault
from apagent.flow_ends import FlowEnds
from apagent.kernel.port import DataPath, FlowMonitor
from apagent.reconcile import Reconciler

log = logging.getLogger(__name__)

Observer = Callable[[Event, list[Effect]], None]
_Step = tuple[Event, list[Effect]]


WELCOME_AGAIN_S = (0.05, 0.2)
"""When an arriving client is told again where the gateway is: a frame that comes before its radio
or its keys are ready is lost, and the client would ask again only after a second."""


ASK_S = (0.0, 0.5)
"""When a client is asked whether it is here, for the same reason."""


class Shell:
    """Drives one engine; `feed` is where our publications go.

    `later` calls something after a number of seconds, as an event loop's `call_later` does.
    """

    def __init__(
        self,
        engine: Engine,
        kernel: DataPath,
        flows: FlowMonitor,
        reconciler: Reconciler,
        feed: FeedLog,
        later: Callable[[float, Callable[[], None]], object],
    ) -> None:
        self._engine = engine
        self._kernel = kernel
        self._ends = FlowEnds(engine, flows, later)
        self._reconciler = reconciler
        self._feed = feed
        self._later = later
        self._waiting: list[Event] = []
        self.carry_further: Callable[[Effect], object] = lambda _: None
        """Carries out the effects that concern anchors (`Upkeep.carry_out`)."""
        self.observers: list[Observer] = []
        """Called with every event and its effects, after they are carried out."""

    def emit(self, event: Event) -> None:
        """Take an event in at the end of this turn of the loop. Call it on the loop's thread."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self.drain)
        self._waiting.append(event)

    def drain(self) -> None:
        """Work off what waits; telling about it can wait until the peers have it."""
        events, self._waiting = self._waiting, []
        if events:
            asyncio.get_running_loop().call_soon(
                self._tell, self._work_off(events, self._reconciler.flush)
            )

    def run(self, events: list[Event], install: Callable[[], object] | None = None) -> None:
        """Work off `events` as one batch; `install`, if given, is how the kernel is changed."""
        self._tell(self._work_off(events, install or self._reconciler.flush))

    def _work_off(self, events: list[Event], install: Callable[[], object]) -> list[_Step]:
        """Do what a roam waits for, in this order: the kernel, the peers, what is left.

        A flow ends here when its packets go elsewhere already.
        """
        now = time.time()
        steps = [(event, self._engine.step(event, now)) for event in events]
        effects = [effect for _, effects in steps for effect in effects]
        install()
        for effect in sorted(effects, key=lambda effect: not isinstance(effect, Publish)):
            self._carry_out(effect)
        return steps

    def _tell(self, steps: list[_Step]) -> None:
        """Tell the log and the observers."""
        for _, effects in steps:
            for effect in effects:
                _note(effect)
        for observer in self.observers:
            for event, effects in steps:
                observer(event, effects)

    def _welcome(self, e: WelcomeClient) -> None:
        kernel = self._kernel
        self._attempt(lambda: kernel.welcome_client(e.network, e.mac, e.addresses, e.elsewhere))

    def _welcome_again(self, e: WelcomeClient) -> None:
        client = self._engine.clients[e.network].get(e.mac)
        if client is not None and client.claim.ap == self._engine.me:
            self._welcome(e)

    def _ask(self, e: AskClient) -> None:
        client = self._engine.clients[e.network].get(e.mac)
        if client is not None and client.claim.ap != self._engine.me:
            self._attempt(lambda: self._kernel.ask_client(e.network, e.mac, e.addresses))

    def _carry_out(self, effect: Effect) -> None:
        kernel = self._kernel
        match effect:
            case Publish():
                self._feed.append(effect.tables, effect.claims, effect.clock, effect.anchor)
            case WelcomeClient() as joined:
                self._welcome(joined)
                for delay_s in WELCOME_AGAIN_S:
                    self._later(delay_s, partial(self._welcome_again, joined))
            case ForgetClient() as left:
                self._attempt(lambda: kernel.forget_client(left.network, left.mac, left.addresses))
            case AskClient() as here:
                for delay_s in ASK_S:
                    self._later(delay_s, partial(self._ask, here))
            case EndFlows():
                self._ends.carry_out(effect)
            case NoteSync():
                self._attempt(kernel.release_hold)
            case _:
                self.carry_further(effect)

    @staticmethod
    def _attempt(action: Callable[[], None]) -> None:
        """What makes a roam smoother is worth a try, and its failure no more than a warning."""
        try:
            action()
        except KernelFault as fault:
            log.warning("%s", fault)


def _note(effect: Effect) -> None:
    match effect:
        case NoteRoam():
            log.info("%s", describe_roam(effect))
        case NotePeer():
            log.info("%s", describe_peer(effect))
        case NoteSync():
            log.info("%s", describe_sync(effect))
        case NoteAnchor():
            log.info("%s", describe_anchor(effect))
        case EndFlows():
            log.info("%d flows end here: %s", len(effect.flows), effect.why.value)


def describe_roam(note: NoteRoam) -> str:
    """A sentence on a roam, for logs and watchers."""
    addresses = ", ".join(map(str, note.addresses)) or "no address yet"
    who = f"client {note.mac} ({addresses}, network {note.network})"
    if note.to_ap is None:
        return f"{who} left the domain from {note.from_ap}"
    if note.from_ap is None:
        return f"{who} is at {note.to_ap} (generation {note.generation}, by {note.source})"
    return (
        f"{who} roamed from {note.from_ap} to {note.to_ap} "
        f"(generation {note.generation}, by {note.source}), {note.flows_kept} flows kept"
    )


def describe_peer(note: NotePeer) -> str:
    """A sentence on a peer's state, for logs and watchers."""
    return f"peer {note.peer}: {note.state}" + (f" ({note.reason})" if note.reason else "")


def describe_anchor(note: NoteAnchor) -> str:
    """A sentence on an AP as an anchor, for logs and watchers."""
    return f"{note.ap}: {note.what}"


def describe_sync(note: NoteSync) -> str:
    """A sentence on having reached sync, for logs and watchers."""
    if note.missing:
        return f"in sync, without {', '.join(note.missing)}: no answer in time, still trying"
    return "in sync with every peer"
