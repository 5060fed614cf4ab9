"""What an AP's kernel holds: conntrack, bridge, and the forwarding state that agents installed.

It outlives the agent, and forwards without it. A reboot empties it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from ipaddress import IPv4Address
from itertools import count
from typing import Any, NamedTuple

from apagent.core.desired import Change, NetworkDelta, NetworkState
from apagent.core.events import ClientAged, ClientSeen, ClientsFound, FlowsChanged, Source
from apagent.core.model import TRANSLATION, FlowKey, Mac, Nat, NetworkName, Translation
from tests.simulation.clients import Client
from tests.simulation.scenario import Violation

GRACE_S = 0.5
"""For so long after a client's arrival its strays are dropped instead of reset."""


class Entry(NamedTuple):
    """A conntrack entry of a translated flow."""

    nat: Nat
    opener: Mac
    """The client that opened it: what no AP can know for certain, and the simulation does."""


class Conntrack:
    """The translated flows of one AP: the only clock of its sessions."""

    def __init__(self, networks: Iterable[NetworkName]) -> None:
        self.tables: dict[NetworkName, dict[FlowKey, Entry]] = {name: {} for name in networks}
        self.listening = False
        self._taken: set[tuple[bytes, int]] = set()
        self._waiting: dict[NetworkName, dict[FlowKey, Nat | None]] = {}
        self._lost = False

    def open(self, network: NetworkName, key: FlowKey, opener: Mac, made: Translation) -> Entry:
        """Translate a new flow; the port stays if it is free, as with Linux."""
        towards = key[4:9] + key[11:] + made.address.packed
        port = next(p for p in count(made.port) if (towards, p) not in self._taken)
        self._taken.add((towards, port))
        entry = Entry(made._replace(port=port).packed, opener)
        self.tables[network][key] = entry
        self._report(network, key, entry.nat)
        return entry

    def close(self, network: NetworkName, key: FlowKey) -> Entry | None:
        """The entry ends; None: it has already."""
        entry = self.tables[network].pop(key, None)
        if entry is not None:
            made = Translation.of(entry.nat)
            self._taken.discard((key[4:9] + key[11:] + made.address.packed, made.port))
            self._report(network, key, None)
        return entry

    def adopt(self, network: NetworkName, key: FlowKey, nat: Nat, opener: Mac) -> bool:
        """Make an entry of another anchor's flow, unless one of ours is in its way (False)."""
        there = self.tables[network].get(key)
        if there is not None and there.nat[TRANSLATION] == nat[TRANSLATION]:
            return True
        made = Translation.of(nat)._replace(generation=0)
        if (key[4:9] + key[11:] + made.address.packed, made.port) in self._taken:
            return False
        self.close(network, key)
        self.open(network, key, opener, made)
        return True

    def overflow(self) -> None:
        """Lose what waits to be read, and some."""
        self._lost = self.listening

    @property
    def waits(self) -> bool:
        """Whether there is something to read."""
        return bool(self._waiting) or self._lost

    def read(self) -> list[FlowsChanged] | None:
        """The net effect of what waits; None: events were lost, the table must be read."""
        waiting, self._waiting = self._waiting, {}
        lost, self._lost = self._lost, False
        return None if lost else [FlowsChanged(*batch) for batch in waiting.items()]

    def dump(self) -> dict[NetworkName, dict[FlowKey, Nat]]:
        """The whole table."""
        return {n: {key: e.nat for key, e in table.items()} for n, table in self.tables.items()}

    def listen(self, *, on: bool) -> None:
        """Begin or end to report."""
        self.listening, self._lost = on, False
        self._waiting.clear()

    def _report(self, network: NetworkName, key: FlowKey, nat: Nat | None) -> None:
        if self.listening:
            self._waiting.setdefault(network, {})[key] = nat


class Bridge:
    """The client interfaces of one AP: who was heard on them."""

    def __init__(self, networks: Iterable[NetworkName]) -> None:
        self.fdb: dict[NetworkName, dict[Mac, None]] = {name: {} for name in networks}
        self.resolved: dict[NetworkName, dict[IPv4Address, Mac]] = {name: {} for name in networks}
        self.listening = False
        self.waiting: list[ClientSeen | ClientAged] = []

    def learn(self, network: NetworkName, mac: Mac) -> None:
        """A frame from `mac` comes in; the bridge says nothing of one that it knows."""
        if mac not in self.fdb[network]:
            self.fdb[network][mac] = None
            self.report(ClientSeen(network, mac, Source.FDB))

    def resolve(self, network: NetworkName, address: IPv4Address, mac: Mac) -> None:
        """The client's ARP gives it a neighbour entry."""
        if self.resolved[network].get(address) != mac:
            self.resolved[network][address] = mac
            self.report(ClientSeen(network, mac, Source.NEIGHBOUR, address))

    def age(self, network: NetworkName, mac: Mac) -> None:
        """The bridge forgets a silent client."""
        if mac in self.fdb[network]:
            del self.fdb[network][mac]
            self.report(ClientAged(network, mac))

    def forget(self, network: NetworkName, mac: Mac, addresses: Iterable[IPv4Address]) -> None:
        """The agent has the client forgotten, which is reported like ageing."""
        for address in addresses:
            if self.resolved[network].get(address) == mac:
                del self.resolved[network][address]
        self.age(network, mac)

    def report(self, event: ClientSeen | ClientAged) -> None:
        """Queue an event; repeated data triggers are what the rate limit swallows."""
        if self.listening and not (self.waiting and self.waiting[-1] == event):
            self.waiting.append(event)

    def read(self) -> list[ClientSeen | ClientAged]:
        """What waits."""
        waiting, self.waiting = self.waiting, []
        return waiting

    def dump(self) -> list[ClientSeen]:
        """Bridge and neighbour table; a stale neighbour entry counts if the bridge knows it."""
        learned = [ClientSeen(n, m, Source.FDB) for n, macs in self.fdb.items() for m in macs]
        return learned + [
            ClientSeen(network, mac, Source.NEIGHBOUR, address)
            for network, table in self.resolved.items()
            for address, mac in table.items()
            if mac in self.fdb[network]
        ]

    def aged(self, ours: set[tuple[NetworkName, Mac]]) -> list[ClientAged]:
        """Those of some clients that neither table knows."""
        there = {(seen.network, seen.mac) for seen in self.dump()}
        return [ClientAged(network, mac) for network, mac in sorted(ours - there)]

    def found(self) -> list[ClientsFound]:
        """The dump as an agent takes it at its start."""
        found: dict[NetworkName, dict[Mac, frozenset[IPv4Address]]] = {}
        for seen in self.dump():
            clients = found.setdefault(seen.network, {})
            addresses = frozenset({seen.address} if seen.address else ())
            clients[seen.mac] = clients.get(seen.mac, frozenset()) | addresses
        return [ClientsFound(network, clients) for network, clients in found.items()]


class Kernel:
    """One AP's kernel."""

    def __init__(self, address: IPv4Address, networks: Iterable[NetworkName]) -> None:
        self.address, self._networks = address, tuple(networks)
        self.uplink_works = True
        self.reboot()

    def source(self, network: NetworkName) -> IPv4Address:
        """What new flows of a network are translated to; masquerading if nothing else is said."""
        return next(iter(self.installed[network].sources.values()), self.address)

    def has(self, address: IPv4Address) -> bool:
        """Whether packets to this address on the uplink come here."""
        held = any(address in state.addresses for state in self.installed.values())
        return self.uplink_works and (held or address == self.address)

    def reboot(self) -> None:
        """Everything is gone."""
        self.conntrack = Conntrack(self._networks)
        self.bridge = Bridge(self._networks)
        self.installed = {name: NetworkState() for name in self._networks}
        self.fresh = True
        """No agent has been here yet."""
        self.held_until = 0.0
        self.grace: dict[tuple[NetworkName, IPv4Address], float] = {}

    def listen(self, *, on: bool) -> None:
        """An agent begins or ends to take events."""
        self.conntrack.listen(on=on)
        self.bridge.listening = on
        self.bridge.waiting.clear()

    def answer(self, client: Client) -> None:
        """An ARP packet of the client comes in."""
        self.bridge.learn(client.network, client.mac)
        if client.address not in self.installed[client.network].neighbours:
            self.bridge.resolve(client.network, client.address, client.mac)

    def apply(self, deltas: Mapping[NetworkName, NetworkDelta]) -> None:
        """Install changes, each of which says what it replaces, and must be right."""
        for name, delta in deltas.items():
            for part in fields(NetworkDelta):
                table: dict[Any, Any] = getattr(self.installed[name], part.name)
                for key, change in getattr(delta, part.name).items():
                    _install(part.name, table, key, change)
            # A permanent entry takes the place of one that was learned.
            for address in delta.neighbours:
                self.bridge.resolved[name].pop(address, None)

    def copy_addresses(self) -> set[tuple[NetworkName, IPv4Address]]:
        """The NAT addresses on the uplink."""
        return {(name, a) for name, state in self.installed.items() for a in state.addresses}

    def copy(self) -> dict[NetworkName, NetworkState]:
        """What an agent reads back."""
        return {
            name: NetworkState(**{f.name: dict(getattr(state, f.name)) for f in fields(state)})
            for name, state in self.installed.items()
        }


def _install(part: str, table: dict[Any, Any], key: object, change: Change[Any]) -> None:
    there = table.get(key)
    if there != change.old:
        raise Violation(f"delta of {part} {key!r}: replaces {change.old}, but {there} is installed")
    if change.new is None:
        del table[key]
    else:
        table[key] = change.new
