"""The shell around the engine: it takes events in, and carries effects and kernel changes out.

Everything runs on one event loop. Sources call `emit`; what they emit within one turn of the loop
is one batch: the engine takes all of it, then the kernel is changed, then the peers are told. So a
roam installs the neighbour entry, moves the host route and is announced in one step.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from apagent.core.effects import Effect, ForgetClient, NotePeer, NoteRoam, NoteSync, Publish
from apagent.core.engine import Engine
from apagent.core.events import Event
from apagent.core.feed import FeedLog
from apagent.errors import KernelFault
from apagent.kernel.port import DataPath
from apagent.reconcile import Reconciler

log = logging.getLogger(__name__)

Observer = Callable[[Event, list[Effect]], None]


class Shell:
    """Drives one engine; `feed` is where our publications go."""

    def __init__(
        self,
        engine: Engine,
        kernel: DataPath,
        reconciler: Reconciler,
        feed: FeedLog,
    ) -> None:
        self._engine = engine
        self._kernel = kernel
        self._reconciler = reconciler
        self._feed = feed
        self._waiting: list[Event] = []
        self.observers: list[Observer] = []
        """Called with every event and its effects, after they are carried out."""

    def emit(self, event: Event) -> None:
        """Take an event in at the end of this turn of the loop. Call it on the loop's thread."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self.drain)
        self._waiting.append(event)

    def drain(self) -> None:
        """Work off what waits."""
        events, self._waiting = self._waiting, []
        if events:
            self.run(events)

    def run(self, events: list[Event]) -> None:
        """Work off `events` as one batch."""
        now = time.time()
        steps = [(event, self._engine.step(event, now)) for event in events]
        self._reconciler.flush()
        for _, effects in steps:
            for effect in effects:
                self._carry_out(effect)
        for observer in self.observers:
            for event, effects in steps:
                observer(event, effects)

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Publish():
                self._feed.append(effect.tables, effect.claims, effect.clock)
            case ForgetClient():
                self._forget(effect)
            case NoteRoam():
                log.info("%s", describe_roam(effect))
            case NotePeer():
                log.info("%s", describe_peer(effect))
            case NoteSync():
                log.info("%s", describe_sync(effect))

    def _forget(self, effect: ForgetClient) -> None:
        try:
            self._kernel.forget_clients(effect.network, [effect.mac])
        except KernelFault as fault:
            log.warning("client %s: its old bridge entry stays: %s", effect.mac, fault)


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


def describe_sync(note: NoteSync) -> str:
    """A sentence on having reached sync, for logs and watchers."""
    if note.missing:
        return f"in sync, without {', '.join(note.missing)}: no answer in time, still trying"
    return "in sync with every peer"
