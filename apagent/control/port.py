"""What the management service asks of the agent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from ipaddress import IPv4Address
from typing import Protocol

from apagent.control.views import AgentEventView, ClientView, FlowView, PeerView, StatusView
from apagent.core.model import ApId, Mac, NetworkName


class ControlBackend(Protocol):
    """The agent's knowledge and its few commands. Called in the agent's event loop."""

    def status(self) -> StatusView:
        """The agent as a whole."""

    def peers(self) -> Sequence[PeerView]:
        """Every configured peer."""

    def clients(self) -> Sequence[ClientView]:
        """Every client that any AP has claimed."""

    def client(self, client: Mac | IPv4Address) -> ClientView:
        """One client by its MAC or address. Raises UnknownClient."""

    def flows(
        self, client: Mac | IPv4Address | None, anchor: ApId | None, protocol: int | None
    ) -> Iterator[FlowView]:
        """The sessions that match; None: any.

        The reader takes its time: the agent's tables change between two items, which must not
        break the iterator. Raises UnknownClient, or ValueError for an unknown AP.
        """

    def associate(
        self, mac: Mac, address: IPv4Address | None, network: NetworkName | None
    ) -> ClientView:
        """Take note that the client is associated here now.

        Raises ValueError for an unknown network or an address outside its prefix, or where
        `network` is needed to tell which one.
        """

    def set_drain(self, ap: ApId | None, *, drain: bool) -> StatusView:
        """Anchor nothing from now on, or anchor again. Raises ValueError if `ap` isn't this AP."""

    def reclaim(self) -> StatusView:
        """Ask for our own NAT addresses back. Raises ValueError where none can move."""

    def subscribe(
        self, callback: Callable[[AgentEventView], None], *, flows: bool
    ) -> Callable[[], None]:
        """Have `callback` called for each event from now on; returns what ends that.

        Flows that open and close are reported only if `flows`.
        """
