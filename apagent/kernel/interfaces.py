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

    def refresh(self) -> bool:
        """Look the indexes up again; whether an interface has been made (anew) since the last time.

        One that was made anew has another index.
        """
        before = self._by_index
        self._by_index = {}
        for network in self._networks:
            with contextlib.suppress(OSError):
                self._by_index[socket.if_nametoindex(network.client_interface)] = network
        return not self._by_index.keys() <= before.keys()

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
