"""Whether the networks' uplinks lead anywhere: carrier, and hosts beyond them that answer pings."""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address

from apagent.core.domain import Network
from apagent.core.model import NetworkName
from apagent.errors import KernelFault
from apagent.kernel.echo import Pinger

ROUNDS_A_PING = 10
"""Hosts of others are pinged once in so many rounds, which is once a second."""
SILENT_ROUNDS = 30
"""Rounds without an answer of any host after which an uplink leads nowhere: three pings."""

_SIOCGIFFLAGS = 0x8913
_IFF_UP, _IFF_RUNNING = 0x1, 0x40
"""netdevice(7); linux/sockios.h, linux/if.h."""
_IFREQ = struct.Struct("=16sH22x")


class LinuxUplinkProber:
    """An `UplinkProber` (apagent.kernel.port) in the current network namespace."""

    def __init__(self, networks: Iterable[Network]) -> None:
        self._networks: dict[NetworkName, str] = {}
        targets: dict[str, set[IPv4Address]] = {}
        for network in networks:
            self._networks[network.name] = network.uplink
            targets.setdefault(network.uplink, set()).update(network.uplink_probes)
        self._flags = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._pings = {uplink: _Pings(uplink, hosts) for uplink, hosts in targets.items() if hosts}
        self._rounds = 0

    def probe(self) -> None:
        """A round: every second, ping the configured hosts. What can't be sent isn't answered."""
        if self._rounds % ROUNDS_A_PING == 0:
            for pings in self._pings.values():
                pings.send()
        self._rounds += 1

    def answered(self) -> Mapping[NetworkName, str]:
        """Why each network's uplink leads nowhere; empty: it works, as far as can be seen."""
        uplinks = set(self._networks.values())
        silent = {uplink: pings.trouble() for uplink, pings in self._pings.items()}
        trouble = {up: self._trouble_of(up) or silent.get(up, "") for up in uplinks}
        return {network: trouble[uplink] for network, uplink in self._networks.items()}

    def close(self) -> None:
        """Close the sockets."""
        self._flags.close()
        for pings in self._pings.values():
            pings.close()

    def _trouble_of(self, uplink: str) -> str:
        request = _IFREQ.pack(uplink.encode(), 0)
        try:
            _, flags = _IFREQ.unpack(fcntl.ioctl(self._flags, _SIOCGIFFLAGS, request))
        except OSError:
            return f"interface {uplink} is gone"
        if not flags & _IFF_UP:
            return f"interface {uplink} is down"
        return "" if flags & _IFF_RUNNING else f"interface {uplink} has no carrier"


class _Pings:
    """Pings of the hosts beyond one uplink."""

    def __init__(self, uplink: str, hosts: Iterable[IPv4Address]) -> None:
        self._uplink = uplink
        self._hosts = sorted(hosts)
        self._pinger = Pinger(uplink)
        self._silent = 0

    def send(self) -> None:
        try:
            self._pinger.send([host.packed for host in self._hosts])
        except KernelFault:
            # The interface is gone: nobody will answer.
            return

    def trouble(self) -> str:
        """Called once a round."""
        self._silent = 0 if self._pinger.answered() else self._silent + 1
        if self._silent < SILENT_ROUNDS:
            return ""
        hosts = ", ".join(map(str, self._hosts))
        return f"no answer by {self._uplink} from {hosts} (networks[].uplink_probes)"

    def close(self) -> None:
        self._pinger.close()
