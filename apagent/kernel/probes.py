"""Whether the peers' kernels are alive, and whether our uplinks lead anywhere: by ICMP echo."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from apagent.core.domain import Domain
from apagent.core.model import ApId
from apagent.kernel.echo import Pinger

PROMPT_PROBES = 10
"""How many probes in a row a peer has to answer within their rounds until it is asked only every
second round. More than a dead one needs to count as alive again (core/liveness.py)."""


class LinuxTunnelProber:
    """A `TunnelProber` (apagent.kernel.port): pings the peers' tunnel addresses.

    Nearly all of what an idle agent costs are these probes, so peers that are spared, and known to
    be well, are asked in every second round. One that then owes an answer is asked in each: it
    counts as dead after the same time as before, on the word of one probe less.

    `DataPath.prepare` comes first, here and at the peers: it makes the device, the address and the
    way back of the answers. Raises KernelFault where that is missing.
    """

    def __init__(self, domain: Domain) -> None:
        device = domain.device(domain.networks[0])
        self._hosts = {peer.id: peer.tunnel_address.packed for peer in domain.peers}
        self._peers = {host: peer for peer, host in self._hosts.items()}
        self._pinger = Pinger(device, domain.me.tunnel_address)
        self._asked: list[bytes] = []
        self._in_a_row = dict.fromkeys(self._peers, 0)
        """Probes that were answered within their rounds."""
        self._all_are_asked = False
        """In this round."""

    def probe(self, peers: Iterable[ApId], spared: Collection[ApId] = ()) -> None:
        """Probe each whose turn it is. Raises KernelFault if the tunnel device is gone."""
        self._all_are_asked = not self._all_are_asked
        hosts = [self._hosts[peer] for peer in peers]
        if not self._all_are_asked:
            left_out = {self._hosts[peer] for peer in spared}
            hosts = [h for h in hosts if h not in left_out or self._in_a_row[h] < PROMPT_PROBES]
        self._asked = hosts
        self._pinger.send(hosts)

    def answered(self) -> frozenset[ApId]:
        """Who has answered one of the latest rounds since the last call."""
        answers = self._pinger.answered()
        for host in self._asked:
            prompt = answers.get(host) == 0
            self._in_a_row[host] = self._in_a_row[host] + 1 if prompt else 0
        self._asked = []
        return frozenset(peer for host in answers if (peer := self._peers.get(host)) is not None)

    def close(self) -> None:
        """Close the socket."""
        self._pinger.close()
