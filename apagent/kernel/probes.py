"""Whether the peers' kernels are alive, and whether our uplinks lead anywhere: by ICMP echo."""

from __future__ import annotations

from collections.abc import Iterable

from apagent.core.domain import Domain
from apagent.core.model import ApId
from apagent.kernel.echo import Pinger


class LinuxTunnelProber:
    """A `TunnelProber` (apagent.kernel.port): pings the peers' tunnel addresses.

    `DataPath.prepare` comes first, here and at the peers: it makes the device, the address and the
    way back of the answers. Raises KernelFault where that is missing.
    """

    def __init__(self, domain: Domain) -> None:
        device = domain.device(domain.networks[0])
        self._hosts = {peer.id: str(peer.tunnel_address) for peer in domain.peers}
        self._peers = {peer.tunnel_address.packed: peer.id for peer in domain.peers}
        self._pinger = Pinger(device, domain.me.tunnel_address)

    def probe(self, peers: Iterable[ApId]) -> None:
        """Send one probe to each. Raises KernelFault if the tunnel device is gone."""
        self._pinger.send(self._hosts[peer] for peer in peers)

    def answered(self) -> frozenset[ApId]:
        """Who has answered one of the latest rounds since the last call."""
        peers = self._peers
        return frozenset(peers[host] for host in self._pinger.answered() if host in peers)

    def close(self) -> None:
        """Close the socket."""
        self._pinger.close()
