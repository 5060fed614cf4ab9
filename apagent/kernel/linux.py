"""The data path on the real kernel: rtnetlink objects and the nftables table together."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address

from apagent.core.domain import Domain, Network
from apagent.core.model import ApId, Mac, NetworkName
from apagent.kernel import neighbours, routing, rules, surroundings, sysctl, tunnel
from apagent.kernel.arp import ArpAnnouncer
from apagent.kernel.needs import missing_needs
from apagent.kernel.nft import NftTable
from apagent.kernel.port import Counters, NetworkDelta, NetworkState, Prepared
from apagent.kernel.state_monitor import LinuxStateMonitor
from apagent.kernel.wire import Message, Netlink

_NETLINK_ROUTE = 0
_STRICT, _LOOSE = 1, 2
_ALWAYS = 1
_PROXY_DELAY = 10
"""Upper bound of a random delay, in hundredths of a second (USER_HZ)."""
_GONE = frozenset({errno.ENOENT, errno.ESRCH})


class LinuxDataPath:
    """A `DataPath` (apagent.kernel.port) on the current network namespace."""

    def __init__(self) -> None:
        self._netlink = Netlink(_NETLINK_ROUTE)
        self._nft = NftTable()
        self._announcers: dict[NetworkName, ArpAnnouncer] = {}
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
        self._prepared = domain
        return Prepared(_prepare_sysctls(domain), changed, fresh)

    def read(self, *, session_maps: bool = True) -> dict[NetworkName, NetworkState]:
        """Read the dynamic state back. Raises KernelFault."""
        domain = self._domain
        states = self._nft.read(domain, session_maps=session_maps)
        host_routes = routing.read_host_routes(self._netlink, domain)
        for network in domain.networks:
            state = states.setdefault(network.name, NetworkState())
            state.routes = host_routes[network.name]
            state.neighbours = neighbours.read_clients(self._netlink, domain, network)
        return states

    def apply(self, deltas: Mapping[NetworkName, NetworkDelta]) -> None:
        """Install the changes: neighbours and routes in one batch, then sets and maps.

        A new neighbour entry comes before the routes and an old one goes after them, so that no
        packet in between makes the kernel ask for the client by ARP. What one of the two refuses
        doesn't keep the other from its part. Raises KernelFault.
        """
        with contextlib.ExitStack() as stack:
            stack.callback(self._nft.apply, self._domain, deltas)
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
            self._announcer(left).tell_all(addresses)

    def welcome_client(
        self,
        network: NetworkName,
        mac: Mac,
        addresses: Iterable[IPv4Address],
        elsewhere: Iterable[IPv4Address],
    ) -> None:
        """Make the first packets of a client that has come to us succeed."""
        joined = self._domain.network_by_name[network]
        own = list(addresses)
        self._nft.welcome(network, own)
        behind = () if joined.isolate_clients else elsewhere
        for address in own:
            self._announcer(joined).tell(mac, address, (joined.gateway, *behind))

    def counters(self) -> Counters:
        """Read our counters. Raises KernelFault."""
        return self._nft.counters()

    def warnings(self) -> list[str]:
        """What of others on this machine keeps us from our work, with what to do."""
        domain = self._prepared
        return [
            *surroundings.flow_offload(self._nft.flowtables()),
            *surroundings.conntrack(),
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
        ]

    def close(self) -> None:
        """Close the sockets; what is installed stays."""
        for announcer in self._announcers.values():
            announcer.close()
        self._netlink.close()
        self._nft.close()

    @property
    def _domain(self) -> Domain:
        if self._prepared is None:
            raise RuntimeError("prepare comes first")
        return self._prepared

    def _announcer(self, network: Network) -> ArpAnnouncer:
        if network.name not in self._announcers:
            self._announcers[network.name] = ArpAnnouncer(network.client_interface)
        return self._announcers[network.name]

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
