"""A roam domain of engines whose messages arrive at once, and whose kernels do as they are told."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import replace
from ipaddress import IPv4Address

from apagent.core.desired import NetworkState
from apagent.core.domain import Forward
from apagent.core.effects import (
    AdoptFlows,
    DefendAddress,
    Effect,
    EndFlows,
    PokeClients,
    ProbeAddress,
    Publish,
)
from apagent.core.engine import Engine
from apagent.core.events import (
    AddressProbed,
    AdoptionFailed,
    Event,
    FlowsAdopted,
    FlowsChanged,
    FlowsListed,
    KernelAdopted,
    PeerConnected,
    PeerDelta,
    PeerDisconnected,
    PeerSnapshot,
    ProbesAnswered,
)
from apagent.core.model import (
    NAT_ADDRESS,
    TRANSLATION,
    ApId,
    FlowKey,
    Mac,
    Nat,
    NatAddress,
    NetworkName,
    SocketKey,
    Translation,
    is_standing,
    socket_of,
)
from tests.domains import LAN, domain, lan

FOREIGN_MAC = Mac("02:00:00:00:00:99")


def home(ap: ApId) -> NatAddress:
    """The NAT address in the configuration of an AP."""
    return NatAddress(LAN, IPv4Address(f"203.0.113.{100 + int(ap.removeprefix('ap'))}"))


class World:
    """Engines `ap1` to `apN`, in sync with each other; every flow of theirs is real."""

    def __init__(
        self,
        aps: int = 3,
        *,
        takeover: bool = True,
        successor: ApId | None = None,
        forwards: Mapping[ApId, tuple[Forward, ...]] | None = None,
    ) -> None:
        self.takeover = takeover
        self.successor = successor
        """The one that `ap1` names."""
        self.forwards = dict(forwards or {})
        """What the APs' configurations have; an agent that is started reads it anew."""
        self.ids = [ApId(f"ap{n}") for n in range(1, aps + 1)]
        self.engines: dict[ApId, Engine] = {}
        self.installed: dict[ApId, NetworkState] = {}
        self.effects: dict[ApId, list[Effect]] = {ap: [] for ap in self.ids}
        self.dead: set[ApId] = set(self.ids)
        """APs without power."""
        self.unheard: set[frozenset[ApId]] = set()
        """Pairs of APs between which the control network is cut."""
        self.unreachable: set[frozenset[ApId]] = set()
        """Pairs of APs between which the tunnel is cut."""
        self.down: dict[ApId, str] = {}
        """APs without uplink."""
        self.refuse_adoption = False
        self.stall_adoption = False
        """Adoptions come to no end for now."""
        self.stalled: list[tuple[ApId, FlowsAdopted]] = []
        self._queue: deque[tuple[ApId, Event]] = deque()
        for ap in self.ids:
            self.boot(ap)
        self.rounds(3)

    # --- what a test does

    def boot(self, ap: ApId) -> None:
        """(Re)boot an AP: its kernel is empty, its agent knows nothing."""
        self.dead.discard(ap)
        self.installed[ap] = NetworkState()
        self._start(ap, [FlowsListed({})])

    def restart(self, ap: ApId) -> None:
        """The agent of an AP is killed and started again; its kernel goes on."""
        table = self.engines[ap].sessions[LAN].table(ap)
        own = {key: made for key, made in table.items() if not is_standing(key)}
        found = self.installed[ap]
        adopted = KernelAdopted(
            LAN,
            found.flows,
            found.routes,
            found.neighbours,
            frozenset(found.addresses),
            found.sockets,
            forwards=found.forwards,
        )
        for other in set(self.ids) - {ap}:
            self._put(other, PeerDisconnected(ap, "restart"))
        self._run()
        self._start(ap, [FlowsListed({LAN: own}), adopted])

    def _start(self, ap: ApId, events: list[Event]) -> None:
        network = replace(lan(), forwards=self.forwards.get(ap, ()))
        if self.takeover:
            successor = self.successor if ap == self.ids[0] else None
            nat = home(ap).address
            network = replace(network, takeover=True, nat_address=nat, successor=successor)
        self.engines[ap] = Engine(domain(ap, len(self.ids), (network,)))
        for event in events:
            self.effects[ap] += self.engines[ap].step(event, 0.0)
        self._align(ap)
        for other in self.ids:
            is_cut = frozenset({ap, other}) in self.unheard
            if other != ap and other in self.engines and not is_cut:
                self.connect(ap, other)

    def connect(self, one: ApId, two: ApId) -> None:
        """Both follow each other's feed from a snapshot, if they can."""
        self.unheard.discard(frozenset({one, two}))
        if not self._hear(one, two):
            return
        for teller, hearer in ((one, two), (two, one)):
            engine = self.engines[teller]
            tables, claims = engine.snapshot()
            statement = engine.anchoring.book.statement()
            copies = {name: dict(table) for name, table in tables.items()}
            self._put(hearer, PeerConnected(teller))
            self._put(hearer, PeerSnapshot(teller, engine.clock, copies, tuple(claims), statement))
        self._run()

    def cut_control(self, one: ApId, two: ApId) -> None:
        """Cut the control network between two APs."""
        self.unheard.add(frozenset({one, two}))
        self.give(one, PeerDisconnected(two, "cut"))
        self.give(two, PeerDisconnected(one, "cut"))

    def power_off(self, ap: ApId) -> None:
        """An AP loses its power: its kernel and its uplink are gone, too."""
        self.dead.add(ap)
        self.installed[ap] = NetworkState()
        for other in set(self.ids) - {ap}:
            self._put(other, PeerDisconnected(ap, "gone"))
        self._run()

    def rounds(self, count: int) -> None:
        """Let so many rounds of probes pass."""
        for _ in range(count):
            for ap in self.ids:
                answered = frozenset(o for o in self.ids if o != ap and self._reach(ap, o))
                self._put(ap, ProbesAnswered(answered, {LAN: self.down.get(ap, "")}))
            self._run()

    def open(self, ap: ApId, *keys: FlowKey, at: IPv4Address | None = None) -> None:
        """Flows are opened at an AP, translated as its kernel is told to."""
        address = at or self.source(ap)
        nat = Translation(address, 40000).packed
        self.give(ap, FlowsChanged(LAN, dict.fromkeys(keys, nat)))

    def close(self, ap: ApId, *keys: FlowKey) -> None:
        """Flows end."""
        self.give(ap, FlowsChanged(LAN, dict.fromkeys(keys)))

    def finish_adoptions(self) -> None:
        """Those that were stalled come to their end, and so do all from now on."""
        self.stall_adoption = False
        stalled, self.stalled = self.stalled, []
        for ap, event in stalled:
            self.give(ap, event)

    def give(self, ap: ApId, event: Event) -> None:
        """An event for one engine, and all that follows from it."""
        self._put(ap, event)
        self._run()

    # --- what a test asks

    def flows(self, ap: ApId) -> set[FlowKey]:
        """What an AP anchors."""
        return {k for k in self.engines[ap].sessions[LAN].table(ap) if not is_standing(k)}

    def said(self, ap: ApId) -> dict[SocketKey, SocketKey]:
        """The port forwards that the standing sessions of an AP say, as every AP knows them."""
        found = []
        for engine in (e for of, e in self.engines.items() if of not in self.dead):
            table = engine.sessions[LAN].table(ap)
            standing = ((key, made) for key, made in table.items() if is_standing(key))
            found.append({_outside(key, made): socket_of(key) for key, made in standing})
        assert all(other == found[0] for other in found)
        return found[0]

    def lead_in(self) -> dict[ApId, dict[SocketKey, SocketKey]]:
        """The port forwards that the kernels have, by AP."""
        return {ap: dict(state.forwards) for ap, state in self.installed.items() if state.forwards}

    def source(self, ap: ApId) -> IPv4Address:
        """What new flows are translated to at an AP."""
        n = int(ap.removeprefix("ap"))
        return self.installed[ap].sources.get("wan", IPv4Address(f"203.0.113.{10 + n}"))

    def owners(self, nat: NatAddress) -> list[ApId]:
        """The APs that have the address on their uplink."""
        return [ap for ap in self.ids if nat.address in self.installed[ap].addresses]

    def way(self, serving: ApId, key: FlowKey) -> ApId:
        """Where the kernel of the serving AP sends a packet of a flow; itself: to conntrack."""
        state = self.installed[serving]
        anchor = state.flows.get(key)
        if anchor is None:
            return state.diverted.get(ApId("*"), serving)
        return (state.diverted.get(anchor, anchor)) or serving

    def seen(self, ap: ApId, kind: type[Effect]) -> list[Effect]:
        """The effects of a kind that an AP has had."""
        return [effect for effect in self.effects[ap] if isinstance(effect, kind)]

    # --- how it works

    def _hear(self, one: ApId, two: ApId) -> bool:
        return not self.dead & {one, two} and frozenset({one, two}) not in self.unheard

    def _reach(self, one: ApId, two: ApId) -> bool:
        return not self.dead & {one, two} and frozenset({one, two}) not in self.unreachable

    def _put(self, ap: ApId, event: Event) -> None:
        self._queue.append((ap, event))

    def _run(self) -> None:
        while self._queue:
            self._run_one()

    def _run_one(self) -> None:
        ap, event = self._queue.popleft()
        if ap in self.dead:
            return
        effects = self.engines[ap].step(event, 0.0)
        self._install(ap)
        self.effects[ap] += effects
        for effect in effects:
            self._carry_out(ap, effect)

    def _install(self, ap: ApId) -> None:
        for delta in self.engines[ap].take_deltas().values():
            for part in NetworkState.__slots__:
                table = getattr(self.installed[ap], part)
                for key, change in getattr(delta, part).items():
                    assert table.get(key) == change.old
                    if change.new is None:
                        del table[key]
                    else:
                        table[key] = change.new
        assert {LAN: self.installed[ap]} == self.engines[ap].wanted()

    def _align(self, ap: ApId) -> None:
        self.engines[ap].take_deltas()
        self.installed[ap] = self.engines[ap].wanted()[LAN]

    def _carry_out(self, ap: ApId, effect: Effect) -> None:
        match effect:
            case Publish(tables, claims, clock, statement):
                for other in self.ids:
                    if other != ap and self._hear(ap, other):
                        self._put(other, PeerDelta(ap, clock, tables, claims, statement))
            case EndFlows(network, flows):
                self._put(ap, FlowsChanged(network, dict.fromkeys(flows)))
            case ProbeAddress(nat):
                used = any(other != ap for other in self._answering(nat, ap))
                self._put(ap, AddressProbed(nat, FOREIGN_MAC if used else None))
            case AdoptFlows(nat, sessions):
                self._adopt(ap, nat, dict(sessions))
            case _:
                pass

    def _adopt(self, ap: ApId, nat: NatAddress, sessions: dict[FlowKey, Nat]) -> None:
        if self.refuse_adoption:
            self._put(ap, AdoptionFailed(nat, "no room"))
        elif self.stall_adoption:
            self.stalled.append((ap, FlowsAdopted(nat, sessions)))
        else:
            self._put(ap, FlowsAdopted(nat, sessions))

    def _answering(self, nat: NatAddress, asking: ApId) -> Iterable[ApId]:
        if asking in self.down:
            return ()
        return (ap for ap in self.owners(nat) if ap not in self.dead and ap not in self.down)


def _outside(key: FlowKey, made: Nat) -> SocketKey:
    return SocketKey(made[NAT_ADDRESS] + key[8:9] + made[TRANSLATION][4:])


__all__ = ["DefendAddress", "NetworkName", "PokeClients", "World", "home"]
