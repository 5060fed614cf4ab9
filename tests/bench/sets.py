"""How many flows an AP's kernel tunnels: the size of its flow map."""

from __future__ import annotations

from apagent.core.model import NetworkName
from apagent.kernel.nft.installed import read_set_size
from apagent.kernel.nft.sets import Names
from apagent.kernel.wire import Netlink
from apagent.lab import namespaces
from apagent.lab.errors import LabError

_NETLINK_NETFILTER = 12
_TABLE, _FLOWS = "apagent", Names.of(NetworkName("lan")).flows


class MapSize:
    """Reads the size of the flow map in one namespace."""

    def __init__(self, namespace: str) -> None:
        with namespaces.inside(namespace):
            self._netlink = Netlink(_NETLINK_NETFILTER)

    def read(self) -> int:
        """How many flows there are. Raises LabError where the kernel doesn't say."""
        size = read_set_size(self._netlink, _TABLE, _FLOWS)
        if size is None:
            raise LabError("this kernel doesn't say how many elements a set has (Linux 6.17 does)")
        return size

    def close(self) -> None:
        """Close the socket."""
        self._netlink.close()
