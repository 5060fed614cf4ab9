"""What the rest of apagent asks of a kernel, as plain data.

Two implementations keep this contract: `apagent.kernel.linux` on the real kernel and the tests'
fake. One contract suite runs against both.

All calls are synchronous: netlink answers a request within the system call that sends it. Every
change is given with the value that the caller believes is installed, so that an adapter can replace
or delete without asking first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Flag, auto
from ipaddress import IPv4Address
from typing import NamedTuple, Protocol

from apagent.core.desired import Change, NetworkDelta, NetworkState
from apagent.core.domain import Domain
from apagent.core.events import ClientAged, ClientSeen, FlowsChanged
from apagent.core.model import ApId, FlowKey, Mac, NatAddress, NetworkName, Sessions

__all__ = [
    "AddressWatch",
    "Change",
    "ClientMonitor",
    "Counters",
    "DataPath",
    "Doubt",
    "FlowMonitor",
    "NetworkDelta",
    "NetworkState",
    "Prepared",
    "StateMonitor",
    "TunnelProber",
    "UplinkProber",
]


class Doubt(Flag):
    """What others may have changed since the last look."""

    ROUTING = auto()
    """Tunnel devices, their addresses and entries, routes, policy rules, client neighbours."""
    TABLE = auto()
    """Our nftables table, session maps included."""
    INTERFACES = auto()
    """A client interface, uplink or tunnel device came, went or changed."""


EVERY_DOUBT = Doubt.ROUTING | Doubt.TABLE | Doubt.INTERFACES


class Prepared(NamedTuple):
    """What `DataPath.prepare` changed, a line each."""

    sysctls: list[str]
    """Outside our own objects, "name: old -> new"."""
    objects: list[str]
    """Of our own: made, changed or removed. Empty: all was right."""
    fresh: bool
    """Our table was made anew, and holds back what could belong to a peer's flow."""


@dataclass(frozen=True, slots=True)
class Counters:
    """What the kernel counted for us since our table was made."""

    leaked: int
    """Packets with a client's source address that the leak guard dropped at an uplink."""
    reset: int
    """TCP packets in mid-connection that matched no flow and were answered with a reset."""


class DataPath(Protocol):
    """The forwarding state of one AP: nftables table, tunnel devices, rules, routes, neighbours."""

    def missing_needs(self, domain: Domain) -> list[str]:
        """What the machine lacks, one sentence each with what to do; empty: all is there.

        Checks CAP_NET_ADMIN, nf_tables, conntrack with events, vxlan, IPv4 forwarding, and that the
        client and uplink interfaces exist. Changes nothing.
        """

    def anchor_numbers(self, table: str) -> dict[ApId, int]:
        """The anchors' numbers that an earlier run left in our nftables table; empty: no table."""

    def prepare(self, domain: Domain) -> Prepared:
        """Make the static part what `domain` says, and adopt what is already right.

        Idempotent. What an earlier run left and is still right is not touched, so nothing that is
        forwarded stops. What belongs to a client interface that doesn't exist (any more) is left
        for later; `warnings` names it. Raises KernelFault.
        """

    def read(self, *, session_maps: bool = True) -> dict[NetworkName, NetworkState]:
        """Read the dynamic state back. `prepare` comes first. Raises KernelFault.

        Without `session_maps` flows and sockets stay empty: they may be a million, the rest is
        read in milliseconds.
        """

    def apply(self, deltas: Mapping[NetworkName, NetworkDelta]) -> None:
        """Install the changes: neighbours and routes first, then sets and maps in transactions.

        Neighbours on a client interface that doesn't exist are passed over. Raises KernelFault;
        then any part of the changes may be installed: `read` tells.
        """

    def release_hold(self) -> None:
        """We are in sync: stop holding back what could belong to a peer's flow.

        A fresh table (none was there to adopt) holds back from its birth, for the domain's
        `sync_timeout_s` at most, by the kernel's own timer. Raises KernelFault.
        """

    def forget_client(
        self, network: NetworkName, mac: Mac, addresses: Iterable[IPv4Address]
    ) -> None:
        """Drop what the bridge and the neighbour table know of a client that has left.

        Without it the bridge says nothing when the client returns. Entries that are permanent or
        already gone are left alone. The clients here are told by ARP that its addresses are behind
        the gateway now. Raises KernelFault.
        """

    def ask_client(self, network: NetworkName, mac: Mac, addresses: Iterable[IPv4Address]) -> None:
        """Ask a client by ARP for its addresses: what it answers is a sighting, if it is here.

        Raises KernelFault.
        """

    def welcome_client(
        self,
        network: NetworkName,
        mac: Mac,
        addresses: Iterable[IPv4Address],
        elsewhere: Iterable[IPv4Address],
    ) -> None:
        """Make the first packets of a client that has come to us succeed.

        It is told by ARP that the gateway, and behind it the addresses `elsewhere`, are here.
        Raises KernelFault.
        """

    def poke(self, network: NetworkName, clients: Mapping[Mac, Iterable[FlowKey]]) -> None:
        """Make clients that we serve send a packet of each of these TCP flows.

        One that only listens would wait for a dead anchor for many minutes. Raises KernelFault.
        """

    def counters(self) -> Counters:
        """Read our counters. Raises KernelFault."""

    def warnings(self) -> list[str]:
        """What of others on this machine keeps us from our work; a sentence each with what to do.

        Raises KernelFault.
        """

    def watch(self) -> StateMonitor:
        """Begin to notice what others change of ours. `prepare` comes first. Raises KernelFault."""

    def remove(self, domain: Domain) -> list[str]:
        """Remove everything that is ours and nothing else; returns what was removed, a line each.

        Idempotent. Raises KernelFault.
        """

    def close(self) -> None:
        """Close the sockets; what is installed stays."""


class StateMonitor(Protocol):
    """What others change of our kernel state, or of what it rests on.

    Our own changes are no news, and cost nothing. A doubt isn't proof: `DataPath.read` tells.
    """

    def fileno(self) -> int:
        """Readable when events are waiting."""

    def read(self) -> Doubt:
        """What the waiting events give reason to doubt; never blocks.

        Raises EventsLost after an overflow: then everything is in doubt.
        """

    def close(self) -> None:
        """Close the sockets."""


class FlowMonitor(Protocol):
    """Conntrack, reduced to the flows of our client prefixes that are source-translated."""

    def fileno(self) -> int:
        """Readable when events are waiting."""

    def read(self) -> list[FlowsChanged]:
        """All waiting events, coalesced to at most one batch a network; never blocks.

        Raises EventsLost after an overflow: then `dump` is the way back.
        """

    def dump(self) -> dict[NetworkName, Sessions]:
        """Read the whole conntrack table. Raises KernelFault."""

    def collect_expired(self) -> None:
        """Make `read` report soon what has expired by now; the kernel takes its time else.

        May be called from another thread than the rest, one call at a time. Raises KernelFault.
        """

    def end(self, network: NetworkName, flows: Iterable[FlowKey]) -> None:
        """Delete the entries of these flows; their ends are reported as events.

        Flows that are gone already are no error. Raises KernelFault.
        """

    def adopt(
        self, network: NetworkName, sessions: Sessions, forwarded: Collection[FlowKey] = ()
    ) -> Collection[FlowKey]:
        """Make entries of another anchor's flows, so that they go on here with its translations.

        Those that are `forwarded` were opened from outside, to a forwarded port.
        They are reported as events, as any; `read` some thousand before you adopt more, or events
        are lost. A flow that is here with the same translation is left alone, and one with another
        (or none) is replaced. Standing sessions can't be adopted. Where another flow of ours is
        translated to the same port towards the same remote, that flow stays: returns those that are
        left out for it. Raises KernelFault; then some of the flows may be adopted.
        """

    def loosen(self, flows: Iterable[FlowKey]) -> None:
        """Check no windows of these TCP flows any more: others see some of their packets.

        Flows that are gone already are no error. Raises KernelFault.
        """

    def close(self) -> None:
        """Close the sockets."""


class ClientMonitor(Protocol):
    """What the kernel notices about clients: bridge FDB, neighbour table, data trigger."""

    def fileno(self) -> int:
        """Readable when events are waiting."""

    def read(self) -> list[ClientSeen | ClientAged]:
        """All waiting events in order; never blocks. Raises EventsLost after an overflow."""

    def dump(self) -> list[ClientSeen]:
        """What FDB and neighbour table say now. Raises KernelFault."""

    def find_interfaces(self) -> bool:
        """Look for the client interfaces again; whether one was made anew since the last look.

        Then what happened on it in between was missed: `dump` is the way back.
        """

    def close(self) -> None:
        """Close the sockets."""


class TunnelProber(Protocol):
    """Whether the peers' kernels answer through the tunnel; their agents have no part in it."""

    def probe(self, peers: Iterable[ApId], spared: Collection[ApId] = ()) -> None:
        """Send one probe to each, which is a round. What can't be sent counts as not answered.

        Those that are `spared`, and have long answered every probe at once, may be left out of
        every second round, but not of two in a row.
        Raises KernelFault if nothing can be sent to anybody: our own tunnel device is gone or down.
        """

    def answered(self) -> frozenset[ApId]:
        """Who has answered one of the latest rounds since the last call; never blocks.

        Answers that come a second late still count, so that a slow underlay is no death.
        """

    def close(self) -> None:
        """Close the sockets."""


class UplinkProber(Protocol):
    """Whether the networks' uplinks lead anywhere."""

    def probe(self) -> None:
        """Send one probe to every configured target of every uplink."""

    def answered(self) -> Mapping[NetworkName, str]:
        """The state of every network's uplink since the last call: why it is down, or empty.

        It is down if the interface is gone or has no carrier, or where targets are configured and
        none of them has answered a probe of the latest round.
        """

    def close(self) -> None:
        """Close the sockets."""


class AddressWatch(Protocol):
    """Who uses NAT addresses on the uplinks' segments, by ARP (RFC 826, RFC 5227)."""

    def fileno(self) -> int:
        """Readable when something was heard."""

    def probe(self, nat: NatAddress) -> None:
        """Ask who uses the address, without saying that we would. Raises KernelFault."""

    def stop_probing(self, nat: NatAddress) -> None:
        """The answer is clear: from now on another machine that asks, too, is no conflict."""

    def announce(self, nat: NatAddress) -> None:
        """Say that we use it. Raises KernelFault."""

    def read(self) -> list[tuple[NatAddress, Mac]]:
        """Every use of a network's NAT address by another machine that was heard; never blocks.

        Only of the networks' own ones, and of those that were probed for or announced.
        """

    def close(self) -> None:
        """Close the sockets."""
