"""One AP's agent at work: its start, its sources, its repair, its stop.

The order of the start matters. Events are subscribed before the tables are read, so that nothing
falls between; our own conntrack table is read before any peer can ask for it, so that no peer ever
sees an empty table of ours and drops its sessions; what an earlier run left is adopted before
anything is changed, so that nothing that is forwarded stops.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from ipaddress import IPv4Address

from apagent.core.engine import Engine
from apagent.core.events import (
    ClientAged,
    ClientSeen,
    ClientsFound,
    Event,
    FlowsChanged,
    FlowsListed,
    KernelAdopted,
    SyncTimedOut,
)
from apagent.core.model import Mac, NetworkName
from apagent.errors import EventsLost, KernelFault
from apagent.kernel.port import ClientMonitor, DataPath, FlowMonitor, StateMonitor
from apagent.pacing import PacedReader
from apagent.reconcile import Reconciler
from apagent.shell import Shell
from apagent.upkeep import Clockwork, Upkeep

log = logging.getLogger(__name__)

RELIST_S = 1.0
"""When a table is read again that the kernel has refused to tell after events were lost."""
COLLECT_INTERVAL_S = 1.0
"""How often the kernel is made to end expired flows, so that their sessions end everywhere."""
COLLECT_SHARE = 0.002
"""How much of the time that may take; where the conntrack table is huge, it is done less often: a
table of 262,144 buckets takes 9 ms, so every five seconds."""


class Agent:
    """Ties the kernel's sources to the shell. Call `adopt`, then `listen`, finally `close`."""

    def __init__(
        self,
        engine: Engine,
        shell: Shell,
        reconciler: Reconciler,
        kernel: DataPath,
        flows: FlowMonitor,
        clients: ClientMonitor,
        monitor: StateMonitor,
    ) -> None:
        self._engine = engine
        self._shell = shell
        self._reconciler = reconciler
        self._kernel = kernel
        self._flows = flows
        self._clients = clients
        self.upkeep = Upkeep(
            reconciler,
            monitor,
            self._find_interfaces,
            self._peer_sessions,
            Clockwork.of(asyncio.get_running_loop()),
        )
        # The kernel walks its whole table within the call; no roam should wait those 10 ms.
        self._collector = ThreadPoolExecutor(1, "conntrack collector")
        self._next_collection: asyncio.TimerHandle | None = None
        self._paced: PacedReader | None = None
        self.resyncs = 0
        """Times that a table had to be read again because events were lost."""

    def adopt(self) -> None:
        """Read what is there: own flows, earlier forwarding state, clients. Raises KernelFault."""
        # Half the time of either listing is the kernel's, in which the other one gets on.
        listing = self._collector.submit(self._flows.dump)
        installed = self._kernel.read()
        events: list[Event] = [FlowsListed(listing.result())]
        for name, state in installed.items():
            events.append(
                KernelAdopted(
                    name,
                    state.flows,
                    state.routes,
                    state.neighbours,
                    frozenset(state.addresses),
                    sockets=state.sockets,
                    elsewhere=state.elsewhere,
                    forwards=state.forwards,
                )
            )
        sightings = self._clients.dump()
        events.extend(_found(sightings))
        ours = {(n, mac) for n, state in installed.items() for mac in state.neighbours.values()}
        events.extend(_aged(ours, sightings))
        self._shell.run(events, lambda: self._reconciler.align(installed))
        own = sum(len(t.table(self._engine.me)) for t in self._engine.sessions.values())
        adopted = sum(len(state.flows) for state in installed.values())
        log.info(
            "own table read: %d sessions; adopted from the kernel: %d peers' sessions", own, adopted
        )

    def listen(self, sync_timeout_s: float) -> None:
        """Start to take the kernel's events in, on the running loop."""
        loop = asyncio.get_running_loop()
        self._paced = PacedReader(loop, self._flows.fileno(), self._read_flows)
        loop.add_reader(self._clients.fileno(), self._guarded, self._read_clients)
        loop.call_later(sync_timeout_s, self._shell.emit, SyncTimedOut())
        loop.add_reader(self.upkeep.fileno(), self._guarded, self.upkeep.read)
        self.upkeep.start()
        self._next_collection = loop.call_later(COLLECT_INTERVAL_S, self._collect_expired)

    def close(self) -> None:
        """Stop listening; what is installed goes on forwarding."""
        loop = asyncio.get_running_loop()
        if self._paced is not None:
            self._paced.close()
        loop.remove_reader(self._clients.fileno())
        loop.remove_reader(self.upkeep.fileno())
        if self._next_collection is not None:
            self._next_collection.cancel()
        self._collector.shutdown()
        self.upkeep.close()
        self._flows.close()
        self._clients.close()
        self._kernel.close()

    def _guarded(self, read: Callable[[], None]) -> None:
        try:
            read()
        except KernelFault as fault:
            log.error("reading kernel events: %s", fault)  # noqa: TRY400 - the text says it all

    def _read_flows(self) -> int:
        """Take in what conntrack reports; how many flows that were."""
        events: list[FlowsChanged] = []
        try:
            events = self._flows.read()
        except EventsLost as lost:
            self._note_loss("conntrack", lost)
            self._until_told(self._list_flows)
        except KernelFault as fault:
            log.error("reading conntrack events: %s", fault)  # noqa: TRY400 - the text says it all
        for event in events:
            self._shell.emit(event)
        return sum(len(event.changes) for event in events)

    def _list_flows(self) -> None:
        self._shell.emit(FlowsListed(self._flows.dump()))

    def _read_clients(self) -> None:
        try:
            for event in self._clients.read():
                self._shell.emit(event)
        except EventsLost as lost:
            self._note_loss("bridge and neighbour", lost)
            self._until_told(self._list_clients)

    def _find_interfaces(self) -> None:
        if self._clients.find_interfaces():
            log.info("a client interface is there anew; looking for its clients")
            self._until_told(self._list_clients)

    def _until_told(self, read_table: Callable[[], None]) -> None:
        """Read a whole table, and again as long as the kernel refuses: no event will tell it."""
        try:
            read_table()
        except KernelFault as fault:
            log.error("reading the whole table: %s; trying again", fault)  # noqa: TRY400 - no trace
            again = partial(self._until_told, read_table)
            asyncio.get_running_loop().call_later(RELIST_S, again)

    def _list_clients(self) -> None:
        """Who is here, and who of those that we serve isn't any more, whatever we have missed."""
        sightings = self._clients.dump()
        me, tables = self._engine.me, self._engine.clients.items()
        ours = {(name, c.claim.mac) for name, table in tables for c in table if c.claim.ap == me}
        events: list[Event] = [*sightings, *_aged(ours, sightings)]
        for event in events:
            self._shell.emit(event)

    def _peer_sessions(self) -> int:
        tables = (table for each in self._engine.sessions.values() for table in each.all())
        return sum(len(sessions) for ap, sessions in tables if ap != self._engine.me)

    def _note_loss(self, what: str, lost: EventsLost) -> None:
        self.resyncs += 1
        log.warning("%s events were lost (%s); reading the whole table again", what, lost)

    def _collect_expired(self) -> None:
        """Have expired flows end, if there are any that could: the table is the whole machine's."""
        loop = asyncio.get_running_loop()
        if not any(tables.table(self._engine.me) for tables in self._engine.sessions.values()):
            self._next_collection = loop.call_later(COLLECT_INTERVAL_S, self._collect_expired)
            return
        began = loop.time()

        def plan_next(_: object) -> None:
            pause = max(COLLECT_INTERVAL_S, (loop.time() - began) / COLLECT_SHARE)
            self._next_collection = loop.call_later(pause, self._collect_expired)

        collect = self._flows.collect_expired
        loop.run_in_executor(self._collector, self._guarded, collect).add_done_callback(plan_next)


def _aged(ours: set[tuple[NetworkName, Mac]], sightings: Iterable[ClientSeen]) -> list[ClientAged]:
    """The clients of ours that the bridge no longer knows: it won't report that they have aged."""
    there = {(seen.network, seen.mac) for seen in sightings}
    return [ClientAged(network, mac) for network, mac in sorted(ours - there)]


def _found(sightings: Iterable[ClientSeen]) -> list[ClientsFound]:
    """Fold a dump of bridge and neighbour table into one event a network."""
    found: dict[NetworkName, dict[Mac, frozenset[IPv4Address]]] = {}
    for sighting in sightings:
        clients = found.setdefault(sighting.network, {})
        addresses = frozenset() if sighting.address is None else frozenset({sighting.address})
        clients[sighting.mac] = clients.get(sighting.mac, frozenset()) | addresses
    return [ClientsFound(network, clients) for network, clients in found.items()]
