"""A kernel in memory: the same contracts as apagent.kernel.port, with hooks for tests.

A `FakeKernel` outlives its adapters, as the real one does: a restarted agent is a second
`FakeDataPath` on the same `FakeKernel`.
"""

from __future__ import annotations

import errno
import os
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from ipaddress import IPv4Address
from typing import Any, TypeVar

from apagent.core.desired import ANY_ANCHOR, NOBODY
from apagent.core.domain import Domain
from apagent.core.events import ClientAged, ClientSeen, FlowsChanged, Source
from apagent.core.model import (
    STATE,
    TRANSLATION,
    ApId,
    Flow,
    FlowKey,
    Mac,
    Nat,
    NetworkName,
    Sessions,
)
from apagent.errors import EventsLost, KernelFault
from apagent.kernel.port import (
    EVERY_DOUBT,
    Change,
    Counters,
    Doubt,
    NetworkDelta,
    NetworkState,
    Prepared,
)
from apagent.kernel.probes import PROMPT_PROBES

K = TypeVar("K")
T = TypeVar("T")


@dataclass
class FakeKernel:
    """What is installed, by whatever adapter."""

    domain: Domain | None = None
    states: dict[NetworkName, NetworkState] = field(default_factory=dict)
    anchors: dict[ApId, int] = field(default_factory=dict)
    counters: Counters = field(default_factory=lambda: Counters(0, 0))
    needs: list[str] = field(default_factory=list)
    """What `missing_needs` answers."""
    warnings: list[str] = field(default_factory=list)
    """What `warnings` answers."""
    sysctls: list[str] = field(default_factory=list)
    """What the next `prepare` says that it changed; it is said once."""
    forgotten: list[tuple[NetworkName, Mac]] = field(default_factory=list)
    """Every client that `forget_client` was given, in order."""
    asked: list[tuple[NetworkName, Mac]] = field(default_factory=list)
    """Every client that `ask_client` was given, in order."""
    welcomed: list[tuple[NetworkName, Mac]] = field(default_factory=list)
    """Every client that `welcome_client` was given, in order."""
    poked: list[tuple[NetworkName, dict[Mac, tuple[FlowKey, ...]]]] = field(default_factory=list)
    """Everything that `poke` was given, in order."""
    holding: bool = False
    """Whether what could belong to a peer's flow is held back."""
    applied: list[dict[NetworkName, NetworkDelta]] = field(default_factory=list)
    """Every set of deltas that `apply` was given, in order."""
    damage: list[str] = field(default_factory=list)
    """What the next `prepare` finds wrong with our objects, and mends."""
    monitors: list[FakeStateMonitor] = field(default_factory=list)

    def tamper(self, doubt: Doubt = EVERY_DOUBT) -> None:
        """Say to all monitors that somebody else has changed something."""
        for monitor in self.monitors:
            monitor.tell(doubt)


class FakeDataPath:
    """A `DataPath` on a `FakeKernel`."""

    def __init__(self, kernel: FakeKernel | None = None) -> None:
        self.kernel = kernel or FakeKernel()
        self._domain: Domain | None = None
        self._faults: dict[str, tuple[KernelFault, int]] = {}

    def fail_next(self, method: str, fault: KernelFault | None = None, after: int = 0) -> None:
        """Make the next call of `method` raise; `apply` installs `after` changes before."""
        self._faults[method] = (fault or KernelFault(f"fake {method}", errno.EIO), after)

    def missing_needs(self, domain: Domain) -> list[str]:
        return list(self.kernel.needs)

    def anchor_numbers(self, table: str) -> dict[ApId, int]:
        installed = self.kernel.domain
        return dict(self.kernel.anchors) if installed and installed.table == table else {}

    def prepare(self, domain: Domain) -> Prepared:
        self._raise_fault("prepare")
        kernel = self.kernel
        fresh = kernel.domain is None
        objects, kernel.damage = kernel.damage, []
        if fresh:
            objects = [f"table inet {domain.table}", *objects]
        kernel.states = {n.name: kernel.states.get(n.name, NetworkState()) for n in domain.networks}
        for name, state in kernel.states.items():
            state.routes = {a: ap for a, ap in state.routes.items() if ap in domain.peer_by_id}
            if not domain.network_by_name[name].takeover:
                state.sources, state.addresses = {}, {}
            if not domain.network_by_name[name].lets_forwards_move:
                state.forwards = {}
            state.diverted = {
                anchor: ap
                for anchor, ap in state.diverted.items()
                if {anchor, ap} <= {ANY_ANCHOR, NOBODY, *domain.peer_by_id}
            }
        kernel.holding = kernel.holding or fresh
        kernel.anchors = {peer.id: peer.number for peer in domain.peers}
        kernel.domain = self._domain = domain
        changed, kernel.sysctls = kernel.sysctls, []
        return Prepared(changed, objects, fresh)

    def read(self, *, session_maps: bool = True) -> dict[NetworkName, NetworkState]:
        self._raise_fault("read")
        aps = {self._prepared.me.id, *self._prepared.peer_by_id}
        states = {name: _readable(state, aps) for name, state in self.kernel.states.items()}
        for state in () if session_maps else states.values():
            state.flows, state.sockets = {}, {}
        return states

    def apply(self, deltas: Mapping[NetworkName, NetworkDelta]) -> None:
        prepared = self._prepared
        self.kernel.applied.append(deepcopy(dict(deltas)))
        fault, budget = self._faults.pop("apply", (None, 0))
        for name, delta in deltas.items():
            state = self.kernel.states[prepared.network_by_name[name].name]
            for part in _PARTS:
                changes: Mapping[Any, Change[Any]] = getattr(delta, part)
                for key, change in changes.items():
                    if fault is not None and budget == 0:
                        raise fault
                    budget -= 1
                    if part in _LEAD_TO and change.new is not None:
                        known = {*prepared.peer_by_id, *_LEAD_TO[part](prepared)}
                        assert change.new in known, f"{part} can't lead to {change.new}"
                    _install(getattr(state, part), key, change, strict=part in _STRICT)
        if fault is not None:
            raise fault

    def release_hold(self) -> None:
        self._raise_fault("release_hold")
        _ = self._prepared
        self.kernel.holding = False

    def forget_client(
        self, network: NetworkName, mac: Mac, addresses: Iterable[IPv4Address]
    ) -> None:
        self._raise_fault("forget_client")
        self.kernel.forgotten.append((self._prepared.network_by_name[network].name, mac))

    def ask_client(self, network: NetworkName, mac: Mac, addresses: Iterable[IPv4Address]) -> None:
        self._raise_fault("ask_client")
        self.kernel.asked.append((self._prepared.network_by_name[network].name, mac))

    def welcome_client(
        self,
        network: NetworkName,
        mac: Mac,
        addresses: Iterable[IPv4Address],
        elsewhere: Iterable[IPv4Address],
    ) -> None:
        self._raise_fault("welcome_client")
        self.kernel.welcomed.append((self._prepared.network_by_name[network].name, mac))

    def poke(self, network: NetworkName, clients: Mapping[Mac, Iterable[FlowKey]]) -> None:
        self._raise_fault("poke")
        poked = {mac: tuple(flows) for mac, flows in clients.items()}
        self.kernel.poked.append((self._prepared.network_by_name[network].name, poked))

    def counters(self) -> Counters:
        self._raise_fault("counters")
        return self.kernel.counters

    def warnings(self) -> list[str]:
        self._raise_fault("warnings")
        return list(self.kernel.warnings)

    def watch(self) -> FakeStateMonitor:
        _ = self._prepared
        monitor = FakeStateMonitor()
        self.kernel.monitors.append(monitor)
        return monitor

    def remove(self, domain: Domain) -> list[str]:
        self._raise_fault("remove")
        if self.kernel.domain is None:
            return []
        self.kernel.domain = None
        self.kernel.states.clear()
        self.kernel.anchors.clear()
        return [f"nftables table inet {domain.table}", *map(domain.device, domain.networks)]

    def close(self) -> None:
        self._domain = None

    @property
    def _prepared(self) -> Domain:
        if self._domain is None:
            raise RuntimeError("prepare comes first")
        return self._domain

    def _raise_fault(self, method: str) -> None:
        fault, _ = self._faults.pop(method, (None, 0))
        if fault is not None:
            raise fault


_PARTS = (
    "addresses",
    "neighbours",
    "routes",
    "sources",
    "forwards",
    "home",
    "known",
    "elsewhere",
    "places",
    "sockets",
    "flows",
    "diverted",
)
"""Addresses, neighbours and routes first; sets and maps are the rest."""
_STRICT = frozenset(
    {
        "sources",
        "forwards",
        "flows",
        "sockets",
        "home",
        "known",
        "elsewhere",
        "places",
        "diverted",
    }
)
"""Sets and maps mind what is there."""
_LEAD_TO: dict[str, Callable[[Domain], set[ApId]]] = {
    "flows": lambda domain: {domain.me.id},
    "sockets": lambda domain: {domain.me.id},
    "places": lambda _: set(),
    "routes": lambda _: set(),
    "diverted": lambda _: {NOBODY},
}
"""What leads to APs, and to whom besides the peers."""


def _install(table: MutableMapping[K, T], key: K, change: Change[T], *, strict: bool) -> None:
    """Make one change; nftables (`strict`) refuses one that believes something wrong."""
    if strict and change.old is None and table.get(key, change.new) != change.new:
        raise KernelFault(f"{key}: is there already", errno.EEXIST)
    if strict and change.old is not None and key not in table:
        raise KernelFault(f"{key}: isn't there", errno.ENOENT)
    if change.new is None:
        table.pop(key, None)
    else:
        table[key] = change.new


def _readable(state: NetworkState, aps: Collection[ApId]) -> NetworkState:
    """A copy; an anchor that is no AP (any more) is read as an id that none can have."""

    def name(ap: ApId) -> ApId:
        return ap if ap in aps else ApId(f"#{ap}")

    copy = replace(state, **{f.name: dict(getattr(state, f.name)) for f in fields(state)})
    copy.flows = {key: name(ap) for key, ap in state.flows.items()}
    copy.sockets = {key: name(ap) for key, ap in state.sockets.items()}
    copy.places = {key: name(ap) for key, ap in state.places.items()}
    return copy


class _Signal:
    """A file descriptor that is readable while something waits."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lost = False

    def fileno(self) -> int:
        return self._fd

    def lose_events(self) -> None:
        """Make the next `read` raise EventsLost, once."""
        self._lost = True
        self._wake()

    def close(self) -> None:
        os.close(self._fd)

    def _wake(self) -> None:
        os.eventfd_write(self._fd, 1)

    def _settle(self) -> None:
        """Everything that waits is about to be read. Raises EventsLost."""
        try:
            os.eventfd_read(self._fd)
        except BlockingIOError:
            return
        if self._lost:
            self._lost = False
            raise EventsLost("fake overflow", errno.ENOBUFS)


class FakeStateMonitor(_Signal):
    """A `StateMonitor`: `FakeKernel.tamper` is what others do."""

    def __init__(self) -> None:
        super().__init__()
        self._doubts = Doubt(0)

    def tell(self, doubt: Doubt) -> None:
        """Somebody has changed something."""
        self._doubts |= doubt
        self._wake()

    def read(self) -> Doubt:
        doubts, self._doubts = self._doubts, Doubt(0)
        self._settle()
        return doubts


class FakeFlowMonitor(_Signal):
    """A `FlowMonitor`: `open_flow` and `close_flow` are what conntrack would do."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[NetworkName, dict[FlowKey, Nat]] = {}
        self.loose: set[FlowKey] = set()
        self.refused_ends = 0
        """How many of the next calls of `end` fail, each at its last flow."""
        self._expired: list[tuple[NetworkName, FlowKey]] = []
        self._waiting: dict[NetworkName, dict[FlowKey, Nat | None]] = {}

    def open_flow(self, network: NetworkName, flow: FlowKey, nat: Nat) -> None:
        """The kernel translates a new flow."""
        self.tables.setdefault(network, {})[flow] = nat
        self._report(network, flow, nat)

    def close_flow(self, network: NetworkName, flow: FlowKey) -> None:
        """The flow's conntrack entry ends."""
        del self.tables[network][flow]
        self._report(network, flow, None)

    def expire_flow(self, network: NetworkName, flow: FlowKey) -> None:
        """The entry's time is over, but the kernel hasn't come by yet."""
        self._expired.append((network, flow))

    def collect_expired(self) -> None:
        for network, flow in self._expired:
            self.close_flow(network, flow)
        self._expired.clear()

    def read(self) -> list[FlowsChanged]:
        waiting, self._waiting = self._waiting, {}
        self._settle()
        return [FlowsChanged(network, changes) for network, changes in waiting.items()]

    def dump(self) -> dict[NetworkName, Sessions]:
        return {network: dict(table) for network, table in self.tables.items()}

    def adopt(
        self, network: NetworkName, sessions: Sessions, forwarded: Collection[FlowKey] = ()
    ) -> Collection[FlowKey]:
        for flow, nat in sessions.items():
            present = self.tables.get(network, {}).get(flow)
            if present is None or present[TRANSLATION] != nat[TRANSLATION]:
                self.open_flow(network, flow, Nat(nat[TRANSLATION] + bytes(4) + nat[STATE:]))
        return ()

    def loosen(self, flows: Iterable[FlowKey]) -> None:
        self.loose.update(flows)

    def end(self, network: NetworkName, flows: Iterable[FlowKey]) -> None:
        keys = list(flows)
        refused = keys.pop() if keys and self.refused_ends else None
        for flow in keys:
            if flow in self.tables.get(network, {}):
                self.close_flow(network, flow)
        if refused is not None:
            self.refused_ends -= 1
            raise KernelFault(f"fake end of {Flow.of(refused)}", errno.ENOBUFS)

    def _report(self, network: NetworkName, flow: FlowKey, nat: Nat | None) -> None:
        self._waiting.setdefault(network, {})[flow] = nat
        self._wake()


class FakeClientMonitor(_Signal):
    """A `ClientMonitor`: `see` and `age` are what bridge, neighbour table and nflog would say."""

    def __init__(self) -> None:
        super().__init__()
        self._known: set[ClientSeen] = set()
        self.anew = False
        """What `find_interfaces` answers next, once."""
        self._waiting: deque[ClientSeen | ClientAged] = deque()

    def see(
        self,
        network: NetworkName,
        mac: Mac,
        source: Source = Source.FDB,
        address: IPv4Address | None = None,
    ) -> None:
        """A source notices a client."""
        seen = ClientSeen(network, mac, source, address)
        if source is not Source.DATA:
            self._known.add(seen)
        self._waiting.append(seen)
        self._wake()

    def age(self, network: NetworkName, mac: Mac) -> None:
        """The bridge forgets a client."""
        self._known -= {ClientSeen(network, mac, Source.FDB)}
        self._waiting.append(ClientAged(network, mac))
        self._wake()

    def read(self) -> list[ClientSeen | ClientAged]:
        waiting = list(self._waiting)
        self._waiting.clear()
        self._settle()
        return waiting

    def dump(self) -> list[ClientSeen]:
        return sorted(self._known, key=str)

    def find_interfaces(self) -> bool:
        anew, self.anew = self.anew, False
        return anew


class FakeTunnelProber:
    """A `TunnelProber`: the peers in `alive` answer."""

    def __init__(self) -> None:
        self.alive: set[ApId] = set()
        self.device_is_gone = False
        self._answers: set[ApId] = set()
        self._rounds = 0
        self._in_a_row: Counter[ApId] = Counter()

    def probe(self, peers: Iterable[ApId], spared: Collection[ApId] = ()) -> None:
        if self.device_is_gone:
            raise KernelFault("fake probe", errno.ENODEV)
        self._rounds += 1
        for peer in peers:
            if self._rounds % 2 or peer not in spared or self._in_a_row[peer] < PROMPT_PROBES:
                self._in_a_row[peer] = self._in_a_row[peer] + 1 if peer in self.alive else 0
                self._answers |= {peer} & self.alive

    def answered(self) -> frozenset[ApId]:
        answers, self._answers = frozenset(self._answers), set()
        return answers

    def close(self) -> None:
        self._answers.clear()
