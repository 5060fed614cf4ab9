"""Client interfaces by index, as events name them."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from ipaddress import IPv4Address

from apagent.core.domain import Domain, Network


class ClientInterfaces:
    """The networks' client interfaces by index."""

    def __init__(self, domain: Domain) -> None:
        self._networks = domain.networks
        self._by_index: dict[int, Network] = {}
        self.refresh()

    def refresh(self) -> None:
        """Look the indexes up again: an interface that was made anew has another one."""
        self._by_index.clear()
        for network in self._networks:
            with contextlib.suppress(OSError):
                self._by_index[socket.if_nametoindex(network.client_interface)] = network

    def __iter__(self) -> Iterator[tuple[int, Network]]:
        return iter(self._by_index.items())

    def network(self, ifindex: int) -> Network | None:
        """The network whose client interface this is."""
        return self._by_index.get(ifindex)

    def network_of_client(self, ifindex: int, address: IPv4Address) -> Network | None:
        """The network in which `address` can be a client's on this interface."""
        network = self._by_index.get(ifindex)
        if network is None or address == network.gateway or address not in network.prefix:
            return None
        return network
