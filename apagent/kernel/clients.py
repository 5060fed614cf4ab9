"""What the kernel notices about clients: bridge FDB, neighbour table, data trigger.

A bridge reports a MAC when it learns it or sees it on another port, and when it ages out. A
neighbour entry goes through many states by timers alone, which say nothing about where the client
is: only a state that a packet from the client led to counts, and only for a new or changed pair of
address and MAC.
"""

from __future__ import annotations

import select
from collections.abc import Iterator
from ipaddress import IPv4Address

from apagent.core.domain import Domain, Network
from apagent.core.events import ClientAged, ClientSeen, Source
from apagent.core.model import Mac
from apagent.kernel.data_trigger import DataTrigger
from apagent.kernel.interfaces import ClientInterfaces
from apagent.kernel.rtnetlink import (
    AF_BRIDGE,
    AF_INET,
    NUD_NOARP,
    NUD_PERMANENT,
    NUD_REACHABLE,
    NUD_STALE,
    RTM_DELNEIGH,
    RTM_NEWNEIGH,
    RTNLGRP_NEIGH,
    Neighbour,
    bridge_entries,
    neighbours,
    parse_neighbour,
)
from apagent.kernel.wire import Netlink, split

_NETLINK_ROUTE = 0
_BUFFER = 1 << 22
"""About 5000 neighbour events: a busy AP's whole table twice over."""
_MESSAGE_SIZE = 1 << 16
_PAIRS = 1 << 14
"""Pairs remembered; a forgotten one is at worst reported a second time."""

ClientEvent = ClientSeen | ClientAged


class LinuxClientMonitor:
    """A `ClientMonitor` (apagent.kernel.port) on the current network namespace.

    What `DataPath.forget_client` deletes is reported as aged out too, which is true as far as the
    kernel knows and changes nothing for a client that is served elsewhere by then.
    """

    def __init__(self, domain: Domain) -> None:
        self._interfaces = ClientInterfaces(domain)
        self._pairs = _Pairs()
        self._buffer = bytearray(_MESSAGE_SIZE)
        self._trigger = DataTrigger(domain, self._interfaces)
        self._events = Netlink(_NETLINK_ROUTE, (RTNLGRP_NEIGH,), _BUFFER)
        self._commands = Netlink(_NETLINK_ROUTE)
        self._epoll = select.epoll()
        self._epoll.register(self._trigger.fileno(), select.EPOLLIN)
        self._epoll.register(self._events.fileno(), select.EPOLLIN)

    def fileno(self) -> int:
        """Readable when events are waiting."""
        return self._epoll.fileno()

    def read(self) -> list[ClientEvent]:
        """All waiting events in order; never blocks. Raises EventsLost after an overflow."""
        return [*self._neighbour_events(), *self._trigger.read()]

    def dump(self) -> list[ClientSeen]:
        """What FDB and neighbour table say now. Raises KernelFault.

        An address counts if it was confirmed in the last half minute, or if the bridge knows its
        MAC: a stale neighbour entry outlives its client.
        """
        self._interfaces.refresh()
        self._pairs.clear()
        return [
            seen for ifindex, network in self._interfaces for seen in self._dump(ifindex, network)
        ]

    def find_interfaces(self) -> bool:
        """Look for the client interfaces again; whether one was made anew since the last look."""
        return self._interfaces.refresh()

    def close(self) -> None:
        """Close the sockets."""
        self._epoll.close()
        self._trigger.close()
        self._events.close()
        self._commands.close()

    def _neighbour_events(self) -> Iterator[ClientEvent]:
        while size := self._events.events(self._buffer):
            for type_, _, _, body in split(bytes(memoryview(self._buffer)[:size])):
                event = self._event(type_, parse_neighbour(body))
                if event is not None:
                    yield event

    def _event(self, type_: int, entry: Neighbour) -> ClientEvent | None:
        if entry.family == AF_BRIDGE:
            return self._bridge_event(type_, entry)
        if entry.family == AF_INET:
            return self._resolved_event(type_, entry)
        return None

    def _bridge_event(self, type_: int, entry: Neighbour) -> ClientEvent | None:
        network = self._interfaces.network(entry.master)
        if network is None or not _is_learned(entry):
            return None
        if type_ == RTM_NEWNEIGH:
            return ClientSeen(network.name, entry.mac, Source.FDB)
        return ClientAged(network.name, entry.mac) if type_ == RTM_DELNEIGH else None

    def _resolved_event(self, type_: int, entry: Neighbour) -> ClientSeen | None:
        if type_ == RTM_DELNEIGH or not entry.lladdr:
            self._pairs.forget(entry)
            return None
        if not entry.state & (NUD_REACHABLE | NUD_STALE):
            return None
        return self._seen(entry) if self._pairs.is_news(entry) else None

    def _dump(self, ifindex: int, network: Network) -> Iterator[ClientSeen]:
        learned = {e.mac for e in bridge_entries(self._commands, ifindex) if _is_learned(e)}
        for mac in learned:
            yield ClientSeen(network.name, mac, Source.FDB)
        for entry in neighbours(self._commands, ifindex):
            here = entry.state & NUD_REACHABLE or (entry.state & NUD_STALE and entry.mac in learned)
            seen = self._seen(entry) if here else None
            if seen is not None:
                self._pairs.is_news(entry)
                yield seen

    def _seen(self, entry: Neighbour) -> ClientSeen | None:
        address = IPv4Address(entry.address)
        network = self._interfaces.network_of_client(entry.ifindex, address)
        if network is None:
            return None
        return ClientSeen(network.name, Mac(entry.mac), Source.NEIGHBOUR, address)


def _is_learned(entry: Neighbour) -> bool:
    """Whether the bridge learned it from a packet; its own and configured addresses it didn't."""
    return not entry.state & (NUD_PERMANENT | NUD_NOARP)


class _Pairs:
    """The pairs of address and MAC that were reported, latest last; bounded."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, bytes], bytes] = {}

    def is_news(self, entry: Neighbour) -> bool:
        """Remember the pair; whether it is new or changed."""
        key = entry.ifindex, entry.address
        if self._known.get(key) == entry.lladdr:
            return False
        self._known[key] = entry.lladdr
        if len(self._known) > _PAIRS:
            del self._known[next(iter(self._known))]
        return True

    def forget(self, entry: Neighbour) -> None:
        """The entry is gone: the next time it comes from the client anew."""
        self._known.pop((entry.ifindex, entry.address), None)

    def clear(self) -> None:
        """Forget all."""
        self._known.clear()
