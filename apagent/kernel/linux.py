"""The data path on the real kernel: rtnetlink objects and the nftables table together."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from ipaddress import IPv4Address

from apagent.core.domain import Domain
from apagent.core.model import ApId, FlowKey, Mac, NetworkName
from apagent.errors import KernelFault
from apagent.kernel import (
    links,
    nat_addresses,
    neighbours,
    routing,
    rules,
    surroundings,
    sysctl,
    tunnel,
)
from apagent.kernel.arp import ArpAnnouncer
from apagent.kernel.needs import missing_needs
from apagent.kernel.nft import NftTable
from apagent.kernel.poke import ClientPoker
from apagent.kernel.port import Counters, NetworkDelta, NetworkState, Prepared
from apagent.kernel.state_monitor import LinuxStateMonitor
from apagent.kernel.untranslated import end_homeless, end_untranslated
from apagent.kernel.wire import Message, Netlink

_NETLINK_ROUTE = 0
_STRICT, _LOOSE = 1, 2
_ALWAYS = 1
_PROXY_DELAY = 10
"""Upper bound of a random delay, in hundredths of a second (USER_HZ)."""
_GONE = frozenset({errno.ENOENT, errno.ESRCH})
ANNOUNCE_AGAIN_S = (0.2, 2.0)
"""When a NAT address is announced again: a broadcast may be lost (RFC 5227, section 2.3)."""

Later = Callable[[float, Callable[[], None]], object]


def _never(_delay_s: float, _callback: Callable[[], None]) -> None:
    """For who has no event loop."""


class LinuxDataPath:
    """A `DataPath` (apagent.kernel.port) on the current network namespace.

    `later` calls something after a number of seconds, as an event loop's `call_later` does. Without
    it a NAT address is announced only once.
    """

    def __init__(self, later: Later = _never) -> None:
        self._netlink = Netlink(_NETLINK_ROUTE)
        self._nft = NftTable()
        self._later = later
        self._announcers: dict[str, ArpAnnouncer] = {}
        self._prepared: Domain | None = None

    def missing_needs(self, domain: Domain) -> list[str]:
        """What the machine lacks, one sentence each with what to do; empty: all is there."""
        return missing_needs(domain)

    def anchor_numbers(self, table: str) -> dict[ApId, int]:
        """The anchors' numbers that an earlier run left in our nftables table."""
        return self._nft.anchor_numbers(table)

    def prepare(self, domain: Domain) -> Prepared:
        """Make the static part what `domain` says, and adopt what is already right.

        Raises KernelFault.
        """
        # First of all the table, because it belongs to one agent: a second one ends here.
        changed, fresh = self._nft.prepare(domain)
        with self._netlink.noting(changed):
            tunnel.prepare_tunnels(self._netlink, domain)
            routing.prepare_routes(self._netlink, domain)
            rules.prepare_rules(self._netlink, domain)
            nat_addresses.delete_strays(self._netlink, domain)
        self._prepared = domain
        if fresh:
            end_untranslated(domain.networks)
        return Prepared(_prepare_sysctls(domain), changed, fresh)

    def read(self, *, session_maps: bool = True) -> dict[NetworkName, NetworkState]:
        """Read the dynamic state back. Raises KernelFault."""
        domain = self._domain
        states = self._nft.read(domain, session_maps=session_maps)
        host_routes = routing.read_host_routes(self._netlink, domain)
        addresses = nat_addresses.read_addresses(self._netlink, domain)
        for network in domain.networks:
            state = states.setdefault(network.name, NetworkState())
            state.routes = host_routes[network.name]
            state.neighbours = neighbours.read_clients(self._netlink, domain, network)
            state.addresses = addresses[network.name]
        return states

    def apply(self, deltas: Mapping[NetworkName, NetworkDelta]) -> None:
        """Install the changes: neighbours and routes in one batch, then sets and maps.

        A new neighbour entry comes before the routes and an old one goes after them, so that no
        packet in between makes the kernel ask for the client by ARP. A NAT address is there before
        flows are translated to it, and until none is any more; it is announced at once, since a
        hundred thousand flows' elements take a second. What one step refuses doesn't keep the
        others from their part. Raises KernelFault.
        """
        with contextlib.ExitStack() as last:
            last.callback(nat_addresses.delete, self._netlink, self._domain, deltas)
            last.callback(self._nft.apply, self._domain, deltas)
            last.callback(self._announce_new, deltas)
            last.callback(nat_addresses.install, self._netlink, self._domain, deltas)
            self._netlink.request(self._rtnetlink_batch(deltas), ignore=_GONE)

    def release_hold(self) -> None:
        """We are in sync: stop holding back what could belong to a peer's flow."""
        self._nft.release_hold(self._domain)

    def forget_client(
        self, network: NetworkName, mac: Mac, addresses: Iterable[IPv4Address]
    ) -> None:
        """Drop what the bridge and the neighbour table know of a client that has left."""
        left = self._domain.network_by_name[network]
        neighbours.forget(self._netlink, left, [mac])
        if not left.isolate_clients:
            self._announcer(left.client_interface).tell_all(addresses)

    def ask_client(self, network: NetworkName, mac: Mac, addresses: Iterable[IPv4Address]) -> None:
        """Ask a client by ARP for its addresses."""
        asked = self._domain.network_by_name[network]
        announcer = self._announcer(asked.client_interface)
        for address in addresses:
            announcer.ask_client(mac, address, asked.gateway)

    def welcome_client(
        self,
        network: NetworkName,
        mac: Mac,
        addresses: Iterable[IPv4Address],
        elsewhere: Iterable[IPv4Address],
    ) -> None:
        """Make the first packets of a client that has come to us succeed."""
        joined = self._domain.network_by_name[network]
        behind = () if joined.isolate_clients else elsewhere
        announcer = self._announcer(joined.client_interface)
        for address in addresses:
            announcer.tell(mac, address, (joined.gateway, *behind))

    def poke(self, network: NetworkName, clients: Mapping[Mac, Iterable[FlowKey]]) -> None:
        """Make clients that we serve send a packet of each of these TCP flows."""
        poker = ClientPoker(self._domain.network_by_name[network].client_interface)
        try:
            poker.poke(clients)
        finally:
            poker.close()

    def counters(self) -> Counters:
        """Read our counters. Raises KernelFault."""
        return self._nft.counters()

    def warnings(self) -> list[str]:
        """What of others on this machine keeps us from our work, with what to do."""
        domain = self._prepared
        return [
            *surroundings.flow_offload(self._nft.flowtables()),
            *surroundings.conntrack(),
            *(surroundings.forwarding() if domain else ()),
            *(surroundings.interfaces(self._netlink, domain) if domain else ()),
        ]

    def watch(self) -> LinuxStateMonitor:
        """Begin to notice what others change of ours. Raises KernelFault."""
        table_port = None if self._nft.is_owned else self._nft.port
        return LinuxStateMonitor(self._domain, self._netlink.port, table_port)

    def remove(self, domain: Domain) -> list[str]:
        """Remove everything that is ours and nothing else; a line each.

        Raises KernelFault; EPERM, with nothing removed, while an agent runs.
        """
        return [
            *self._nft.remove(domain),
            *rules.remove_rules(self._netlink, domain),
            *routing.remove_routes(self._netlink, domain),
            *tunnel.remove_tunnels(self._netlink, domain),
            *neighbours.remove_clients(self._netlink, domain),
            *nat_addresses.remove_addresses(self._netlink, domain),
            *self._end_homeless(domain),
        ]

    def close(self) -> None:
        """Close the sockets; what is installed stays."""
        for announcer in self._announcers.values():
            announcer.close()
        self._netlink.close()
        self._nft.close()

    def _end_homeless(self, domain: Domain) -> list[str]:
        """Without the table nobody else would."""
        here = {address.local.packed for address in links.addresses(self._netlink)}
        ended = end_homeless(domain.networks, here)
        return [f"conntrack entries of {ended} flows of addresses that move"] if ended else []

    @property
    def _domain(self) -> Domain:
        if self._prepared is None:
            raise RuntimeError("prepare comes first")
        return self._prepared

    def _announcer(self, interface: str) -> ArpAnnouncer:
        if interface not in self._announcers:
            self._announcers[interface] = ArpAnnouncer(interface)
        return self._announcers[interface]

    def _announce_new(self, deltas: Mapping[NetworkName, NetworkDelta]) -> None:
        for name, delta in deltas.items():
            new = [address for address, change in delta.addresses.items() if change.new is not None]
            if new:
                self._announce(name, new)
                for delay_s in ANNOUNCE_AGAIN_S:
                    self._later(delay_s, partial(self._announce, name, new))

    def _announce(self, name: NetworkName, addresses: Iterable[IPv4Address]) -> None:
        """Tell the uplink's segment that we hold these addresses, if we do (still).

        Where that can't be done, whoever asks by ARP gets the kernel's answer.
        """
        with contextlib.suppress(KernelFault):
            held = nat_addresses.read_addresses(self._netlink, self._domain)[name]
            uplink = self._domain.network_by_name[name].uplink
            self._announcer(uplink).tell_all(a for a in addresses if a in held)

    def _rtnetlink_batch(self, deltas: Mapping[NetworkName, NetworkDelta]) -> list[Message]:
        install: list[Message] = []
        routes: list[Message] = []
        delete: list[Message] = []
        for name, delta in deltas.items():
            network = self._domain.network_by_name[name]
            added, deleted = neighbours.client_messages(self._domain, network, delta.neighbours)
            install += added
            delete += deleted
            routes += routing.host_route_messages(self._domain, network, delta.routes)
        return [*install, *routes, *delete]


def _prepare_sysctls(domain: Domain) -> list[str]:
    """What must change outside our own devices; the lines that say so.

    - A strict reverse path filter on a client interface drops what a client sends before its host
      route, which still leads to the AP that it left, is gone.
    - With conntrack events on demand only (2), a flow that opens while no agent listens never
      reports its end.
    - Without proxy ARP a client can't find one that another AP serves. The AP answers after a
      delay and looks again then, so that it doesn't answer for a client that has just come back.
    """
    changed = [sysctl.ensure(sysctl.CONNTRACK_EVENTS, _ALWAYS)]
    present = {name for _, name in socket.if_nameindex()}
    for network in domain.networks:
        if network.client_interface not in present:
            continue
        if not network.isolate_clients:
            proxy_arp = sysctl.interface(network.client_interface, "proxy_arp")
            delay = sysctl.neighbour(network.client_interface, "proxy_delay")
            changed += [sysctl.ensure(proxy_arp, 1), sysctl.ensure(delay, _PROXY_DELAY)]
        strict = sysctl.interface(network.client_interface, "rp_filter")
        # The kernel takes the higher one of "all" and the interface's own value.
        values = (sysctl.read(sysctl.interface("all", "rp_filter")), sysctl.read(strict))
        if max(value or 0 for value in values) == _STRICT:
            changed.append(sysctl.ensure(strict, _LOOSE))
    return [line for line in changed if line is not None]
