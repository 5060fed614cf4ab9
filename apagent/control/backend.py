"""The management service's view of a running agent: read-only looks at the engine, one command."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from ipaddress import IPv4Address

from apagent import __version__
from apagent.agent import Agent
from apagent.control.narrate import flow_events, note_events
from apagent.control.views import (
    AgentEventView,
    AnchorView,
    ClientView,
    FlowView,
    NetworkView,
    PeerView,
    RoamView,
    StatusView,
)
from apagent.core.claims import usable
from apagent.core.clients import Client
from apagent.core.desired import ANY_ANCHOR
from apagent.core.digest import checksum
from apagent.core.domain import Network
from apagent.core.effects import Effect
from apagent.core.engine import Engine, PeerState
from apagent.core.events import ClientSeen, DrainRequested, Event, ReclaimRequested, Source
from apagent.core.model import (
    PROTOCOL_NAMES,
    PROTOCOL_OFFSET,
    AnchorMode,
    ApId,
    Flow,
    FlowKey,
    Mac,
    Nat,
    NetworkName,
    Sessions,
    Translation,
)
from apagent.errors import KernelFault, NotReady, UnknownClient
from apagent.kernel.port import Counters, DataPath
from apagent.peers.client import PeerSubscription
from apagent.reconcile import Reconciler
from apagent.shell import Shell

_NO_COUNTERS = Counters(leaked=0, reset=0)


class EngineBackend:
    """A `ControlBackend` on the engine and what is around it."""

    def __init__(
        self,
        engine: Engine,
        shell: Shell,
        agent: Agent,
        reconciler: Reconciler,
        kernel: DataPath,
        subscriptions: Sequence[PeerSubscription],
        sysctls: Sequence[str],
    ) -> None:
        self._engine = engine
        self._shell = shell
        self._agent = agent
        self._reconciler = reconciler
        self._kernel = kernel
        self._subscriptions = subscriptions
        self._sysctls = tuple(sysctls)
        self._started = time.monotonic()

    def status(self) -> StatusView:
        """The agent as a whole."""
        engine, domain = self._engine, self._engine.domain
        counts = dict.fromkeys((engine.me, *engine.peers), 0)
        for tables in engine.sessions.values():
            for ap, table in tables.all():
                counts[ap] += len(table)
        clients = [client for table in engine.clients.values() for client in table]
        here = sum(client.claim.ap == engine.me for client in clients)
        counters, trouble = self._counters()
        return StatusView(
            ap=engine.me,
            version=__version__,
            in_sync=engine.in_sync,
            degraded=(*trouble, *self._degraded()),
            uptime_s=time.monotonic() - self._started,
            own_sessions=counts.pop(engine.me),
            peer_sessions=sum(counts.values()),
            clients_here=here,
            clients_elsewhere=len(clients) - here,
            clock=engine.clock,
            tunnel_mtu=domain.tunnel_mtu,
            tcp_mss=domain.mss,
            leaked_packets=counters.leaked,
            reset_packets=counters.reset,
            resyncs=self._agent.resyncs,
            repairs=self._reconciler.repairs,
            networks=tuple(_network_view(network) for network in domain.networks),
            sysctls=self._sysctls,
            tunnel_address=str(domain.me.tunnel_address),
            anchors=tuple(self._anchor_view(network) for network in domain.networks),
            checksum=checksum(engine.digests(engine.me)),
        )

    def peers(self) -> list[PeerView]:
        """Every configured peer."""
        return [self._peer_view(subscription) for subscription in self._subscriptions]

    def clients(self) -> list[ClientView]:
        """Every client that any AP has claimed."""
        return [
            self._client_view(client) for table in self._engine.clients.values() for client in table
        ]

    def client(self, client: Mac | IPv4Address) -> ClientView:
        """One client by its MAC or address. Raises UnknownClient."""
        return self._client_view(self._find(client))

    def flows(
        self, client: Mac | IPv4Address | None, anchor: ApId | None, protocol: int | None
    ) -> Iterator[FlowView]:
        """The sessions that match; None: any. Raises UnknownClient, or ValueError for the AP."""
        engine = self._engine
        if anchor is not None and anchor not in (engine.me, *engine.peers):
            known = ", ".join((engine.me, *engine.peers))
            raise ValueError(f"no AP is called {anchor}; the domain has: {known}")
        addresses = None
        if client is not None:
            addresses = {address.packed for address in self._find(client).claim.addresses}
        # Each table is copied when its turn comes: it changes while the reader takes its time.
        return (
            self._flow_view(network, ap, key, nat)
            for network, tables in engine.sessions.items()
            for ap, table in tables.all()
            if anchor in (None, ap)
            for key, nat in _matching(table, addresses, protocol)
        )

    def associate(
        self, mac: Mac, address: IPv4Address | None, network: NetworkName | None
    ) -> ClientView:
        """Take note that the client is associated here now. Raises ValueError, NotReady."""
        found = self._network(network)
        if address is not None and not usable(found, address):
            raise ValueError(
                f"{address} is not a client's address in network {found.name} ({found.prefix})"
            )
        if not self._engine.in_sync:
            raise NotReady("the agent is not in sync with its peers yet; try again in a moment")
        self._shell.run([ClientSeen(found.name, mac, Source.MANAGEMENT, address)])
        client = self._engine.clients[found.name].get(mac)
        if client is None:
            raise UnknownClient(f"{mac} is not known after its association")
        return self._client_view(client)

    def set_drain(self, ap: ApId | None, *, drain: bool) -> StatusView:
        """Anchor nothing from now on, or anchor again. Raises ValueError if `ap` isn't this AP."""
        if ap not in (None, self._engine.me):
            raise ValueError(f"this is the agent of {self._engine.me}: ask that of {ap} itself")
        self._shell.run([DrainRequested(drain)])
        return self.status()

    def reclaim(self) -> StatusView:
        """Ask for our own NAT addresses back. Raises ValueError where none can move."""
        if not any(network.takeover for network in self._engine.domain.networks):
            raise ValueError("no network here has a NAT address that can move: see takeover")
        self._shell.run([ReclaimRequested()])
        return self.status()

    def subscribe(
        self, callback: Callable[[AgentEventView], None], *, flows: bool
    ) -> Callable[[], None]:
        """Have `callback` called for each event from now on; returns what ends that."""

        def observe(event: Event, effects: list[Effect]) -> None:
            now = time.time()
            for view in note_events(effects, now):
                callback(view)
            if flows:
                for view in flow_events(event, effects, self._engine.me, now):
                    callback(view)

        self._shell.observers.append(observe)
        return lambda: self._shell.observers.remove(observe)

    def _counters(self) -> tuple[Counters, tuple[str, ...]]:
        try:
            return self._kernel.counters(), tuple(self._kernel.warnings())
        except KernelFault as fault:
            return _NO_COUNTERS, (f"our counters can't be read: {fault}",)

    def _degraded(self) -> Iterator[str]:
        for name in self._engine.sessions:
            if trouble := self._engine.anchoring.book.trouble(name):
                yield f"the uplink of network {name} is down: {trouble}"
        if self._reconciler.fault is not None:
            yield f"the kernel refuses the desired state: {self._reconciler.fault}"
        yield from self._agent.upkeep.degraded
        for subscription in self._subscriptions:
            feed = subscription.follower
            if self._engine.peers[feed.peer] is not PeerState.IN_SYNC:
                reason = feed.reason or "it has not answered yet"
                yield (
                    f"peer {feed.peer} at {subscription.endpoint} is "
                    f"{self._engine.peers[feed.peer]}: {reason}"
                )
            if feed.peer in self._engine.anchoring.book.dead:
                yield (
                    f"peer {feed.peer} doesn't answer through the tunnel: it is down, or "
                    f"the way to {self._engine.domain.peer_by_id[feed.peer].underlay} is"
                )
            elif feed.peer in self._engine.anchoring.liveness.silent:
                yield (
                    f"peer {feed.peer} has never answered a ping through the tunnel, so that its "
                    "death will be noticed late: does the tunnel work, and does its firewall let "
                    f"pings in on {self._engine.domain.device_prefix}*?"
                )

    def _anchor_view(self, network: Network) -> AnchorView:
        anchoring = self._engine.anchoring
        book, state = anchoring.book, anchoring.states[network.name]
        source = state.sources.get(network.uplink) if network.takeover else network.nat_address
        return AnchorView(
            network=network.name,
            mode=book.mode(network.name),
            trouble=book.trouble(network.name),
            translates_to="masquerade" if source is None else str(source),
            holds=tuple(map(str, sorted(state.addresses))),
            flows=anchoring.own_left(network.name),
            deputy=state.diverted.get(ANY_ANCHOR, ""),
        )

    def _peer_mode(self, peer: ApId) -> AnchorMode:
        """Its mode in the network where it is furthest from active."""
        modes = list(AnchorMode)
        book = self._engine.anchoring.book
        return max((book.mode_of(peer, name) for name in self._engine.sessions), key=modes.index)

    def _peer_view(self, subscription: PeerSubscription) -> PeerView:
        engine, feed = self._engine, subscription.follower
        peer = feed.peer
        return PeerView(
            id=peer,
            address=str(subscription.endpoint),
            underlay=str(engine.domain.peer_by_id[peer].underlay),
            state=engine.peers[peer],
            reason=feed.reason,
            sessions=sum(len(tables.table(peer)) for tables in engine.sessions.values()),
            clients=sum(
                client.claim.ap == peer for table in engine.clients.values() for client in table
            ),
            epoch=feed.epoch,
            sequence=feed.sequence,
            refused=feed.refused,
            snapshots=feed.snapshots,
            deltas=feed.deltas,
            tunnel_address=str(engine.domain.peer_by_id[peer].tunnel_address),
            tunnel="dead" if peer in engine.anchoring.book.dead else "alive",
            mode=self._peer_mode(peer),
            holds=tuple(str(nat.address) for nat in engine.anchoring.book.holds_of(peer)),
            checksum=checksum(engine.digests(peer)),
            protocol_version=feed.version,
            differences=feed.differences,
            changes_received=feed.changes,
        )

    def _client_view(self, client: Client) -> ClientView:
        claim = client.claim
        return ClientView(
            network=claim.network,
            mac=claim.mac,
            addresses=tuple(map(str, sorted(claim.addresses))),
            serving_ap="" if claim.released else claim.ap,
            generation=claim.generation,
            flows_by_anchor={str(ap): n for ap, n in self._engine.claims.flows_of(client).items()},
            since_s=time.time() - client.since,
            roams=tuple(
                RoamView(
                    move.from_ap or "",
                    move.to_ap or "",
                    move.generation,
                    move.source,
                    move.time,
                    move.flows_kept,
                )
                for move in client.moves
            ),
        )

    def _flow_view(self, network: NetworkName, ap: ApId, key: FlowKey, nat: Nat) -> FlowView:
        flow, translation = Flow.of(key), Translation.of(nat)
        owner = self._engine.clients[network].owner(flow.client)
        return FlowView(
            network=network,
            protocol=PROTOCOL_NAMES[flow.protocol],
            client=str(flow.client),
            client_port=flow.client_port,
            remote=str(flow.remote),
            remote_port=flow.remote_port,
            anchor=ap,
            nat_address=str(translation.address),
            nat_port=translation.port,
            client_mac=owner.claim.mac if owner else "",
            serving_ap=owner.claim.ap if owner else "",
        )

    def _find(self, client: Mac | IPv4Address) -> Client:
        for table in self._engine.clients.values():
            found = table.owner(client) if isinstance(client, IPv4Address) else table.get(client)
            if found is not None:
                return found
        raise UnknownClient(f"no AP has seen the client {client}; `apctl clients` lists all")

    def _network(self, name: NetworkName | None) -> Network:
        networks = self._engine.domain.network_by_name
        if name is None and len(networks) == 1:
            return next(iter(networks.values()))
        if name is None or name not in networks:
            what = "name the network" if name is None else f"there is no network {name}"
            raise ValueError(f"{what}; this AP has: {', '.join(networks)}")
        return networks[name]


def _matching(
    table: Sessions, addresses: set[bytes] | None, protocol: int | None
) -> Iterator[tuple[FlowKey, Nat]]:
    for key, nat in tuple(table.items()):
        if addresses is not None and key[:4] not in addresses:
            continue
        if protocol is not None and key[PROTOCOL_OFFSET] != protocol:
            continue
        yield key, nat


def _network_view(network: Network) -> NetworkView:
    return NetworkView(
        name=network.name,
        client_interface=network.client_interface,
        prefix=str(network.prefix),
        gateway=str(network.gateway),
        vni=network.vni,
        uplink=network.uplink,
        nat="masquerade" if network.nat_address is None else str(network.nat_address),
    )
