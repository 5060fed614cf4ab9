"""Clients and their flows: where each one really is, which the agents can only find out."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import IPv4Address

from apagent.core.model import ICMP, TCP, UDP, ApId, Flow, FlowKey, Mac, Nat, NetworkName

REMOTES = [IPv4Address(f"198.51.100.{n}") for n in range(10, 14)]
SERVICE = 443
MAX_TALKS = 8
"""Flows that a client keeps up at most."""


@dataclass(slots=True)
class Talk:
    """A flow as the client has it."""

    key: FlowKey
    nat: Nat | None = None
    """For TCP: what the server has seen since the handshake."""
    contested: bool = False
    """Another AP translated one like it, too: an earlier one, or this one's first SYN. Only one of
    the two can go on."""

    @property
    def protocol(self) -> int:
        """TCP, UDP or ICMP."""
        return self.key[8]


@dataclass
class Client:
    """A client: associated with one AP, or with none while it roams or is away."""

    mac: Mac
    network: NetworkName
    address: IPv4Address
    first_port: int
    at: ApId | None = None
    talks: list[Talk] = field(default_factory=list)
    past: list[FlowKey] = field(default_factory=list)
    """Flows that it had, whose ports it may use again."""

    def new_flow(self, kind: int, remote: int) -> FlowKey | None:
        """What the client opens next; None: it can't.

        `kind`: a TCP connection, a UDP socket, one more remote on its latest UDP socket, an echo, a
        flow just as one that it had.
        """
        to = REMOTES[remote % len(REMOTES)]
        match kind % 5:
            case 0:
                return self._key(TCP, to, SERVICE)
            case 1:
                return self._key(UDP, to, SERVICE)
            case 2:
                return self._same_socket(to)
            case 3:
                return self._key(ICMP, to, 0)
        reusable = [key for key in self.past if key[:4] == self.address.packed]
        return reusable[remote % len(reusable)] if reusable else None

    def end(self, talk: Talk) -> None:
        """The client has done with this flow."""
        self.talks.remove(talk)
        self.past = [*self.past[-MAX_TALKS:], talk.key]

    def talk(self, key: FlowKey) -> Talk | None:
        """Its flow with this key."""
        return next((talk for talk in self.talks if talk.key == key), None)

    def _key(self, protocol: int, remote: IPv4Address, remote_port: int) -> FlowKey:
        self.first_port += 1
        return Flow(protocol, self.address, self.first_port, remote, remote_port).key

    def _same_socket(self, remote: IPv4Address) -> FlowKey | None:
        sockets = [Flow.of(talk.key) for talk in self.talks if talk.protocol == UDP]
        return sockets[-1]._replace(remote=remote).key if sockets else None
