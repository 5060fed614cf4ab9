"""The floor of a roam: everything preloaded, and the few things that must change changed by hand.

The agents are stopped, what they installed stays. As soon as the client's link is up at its new AP,
messages that were packed before go out on sockets that were open before: the new AP gets the
client's neighbour entry and loses its host route, the anchor's host route leads to the new AP, the
former AP's too, what the kernels had learned of the client counts no more, and what the former AP's
bridge has learned is deleted. No control plane can be faster than that; what is left is the
kernel's work and the way of the packets.
"""

from __future__ import annotations

import contextlib
import errno
import signal
import socket
from ipaddress import IPv4Address

from apagent.config import parse
from apagent.core.domain import Domain
from apagent.core.model import ApId, Mac
from apagent.kernel.linux import LinuxDataPath
from apagent.kernel.neighbours import client_messages
from apagent.kernel.nft.elements import renewal
from apagent.kernel.nft.messages import BEGIN, END
from apagent.kernel.nft.sets import SETTLED
from apagent.kernel.port import Change
from apagent.kernel.routing import host_route_messages
from apagent.kernel.rtnetlink import AF_BRIDGE, NTF_MASTER, Neighbour, delete_neighbour, mac_bytes
from apagent.kernel.wire import Message, Netlink
from apagent.lab import namespaces
from apagent.lab.lab import Lab

_HARMLESS = frozenset({errno.ENOENT, errno.ESRCH})
_MTU = 1450
_NETLINK_NETFILTER = 12


class ByHand:
    """Roams a client in place of the agents, which it stops at the first roam."""

    def __init__(self, lab: Lab, client: str) -> None:
        self._lab = lab
        self._client = client
        station = lab.plan.station(client)
        self._address: IPv4Address = station.address
        self._mac = Mac(station.mac or "")
        self._at = lab.location(client)
        self._sockets: dict[str, Netlink] = {}
        self._tables: dict[str, Netlink] = {}
        self._domains: dict[str, Domain] = {}
        self._settle = renewal("apagent", SETTLED, [self._address.packed])

    def take_over(self, ap: str) -> int:
        """Move the client's link and then the rest; when the link was up (CLOCK_MONOTONIC, ns)."""
        if not self._sockets:
            self._stop_agents()
        steps = self._steps(self._at, ap)
        linked = self._lab.roam(self._client, ap)
        for node, messages in steps:
            self._sockets[node].request(messages, ignore=_HARMLESS)
            self._tables[node].transaction(BEGIN, self._settle, END)
        self._at = ap
        return linked

    def close(self) -> None:
        """Close the sockets."""
        for netlink in (*self._sockets.values(), *self._tables.values()):
            netlink.close()

    def _stop_agents(self) -> None:
        for ap in self._lab.aps:
            with (
                namespaces.inside(self._lab.namespace(ap)),
                contextlib.closing(LinuxDataPath()) as path,
            ):
                config = parse(self._lab.agents.config_file(ap).read_text(encoding="utf-8"))
                self._domains[ap] = config.domain(path.anchor_numbers(config.kernel.table), _MTU)
                self._sockets[ap] = Netlink(socket.NETLINK_ROUTE)
                self._tables[ap] = Netlink(_NETLINK_NETFILTER)
            self._lab.kill_agent(ap, signal.SIGKILL)

    def _steps(self, before: str, after: str) -> list[tuple[str, list[Message]]]:
        """What to change where, in this order."""
        others = [ap for ap in self._lab.aps if ap not in (before, after)]
        routes = [(ap, self._route(ap, after)) for ap in others]
        leave = [*self._route(before, after), *self._leave(before)]
        return [(after, self._arrive(after)), *routes, (before, leave)]

    def _arrive(self, ap: str) -> list[Message]:
        with namespaces.inside(self._lab.namespace(ap)):
            [network] = self._domains[ap].networks
            changes = {self._address: Change(None, self._mac)}
            install, _ = client_messages(self._domains[ap], network, changes)
            gone = Change(ApId(self._at), None)
            return [
                *install,
                *host_route_messages(self._domains[ap], network, {self._address: gone}),
            ]

    def _route(self, ap: str, serving: str) -> list[Message]:
        with namespaces.inside(self._lab.namespace(ap)):
            [network] = self._domains[ap].networks
            changes = {self._address: Change(None, ApId(serving))}
            return host_route_messages(self._domains[ap], network, changes)

    def _leave(self, ap: str) -> list[Message]:
        with namespaces.inside(self._lab.namespace(ap)):
            [network] = self._domains[ap].networks
            changes = {self._address: Change(self._mac, None)}
            _, delete = client_messages(self._domains[ap], network, changes)
            port = socket.if_nametoindex(self._lab.plan.network(self._client).radio)
            learned = Neighbour(AF_BRIDGE, port, mac_bytes(self._mac), b"", flags=NTF_MASTER)
            return [*delete, delete_neighbour(learned, "what the bridge has learned")]
