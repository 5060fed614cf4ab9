"""An agent as the management service sees it, without one behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import IPv4Address

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
from apagent.core.model import PROTOCOL_NAMES, ApId, Mac, NetworkName
from apagent.errors import NotReady, UnknownClient

ANCHOR = AnchorView("lan", "active", "", "203.0.113.11", ("203.0.113.11",), 2, "")
STATUS = StatusView(
    ap="ap1",
    version="9.8.7",
    in_sync=True,
    degraded=(),
    uptime_s=3723.5,
    own_sessions=2,
    peer_sessions=1 << 40,
    clients_here=1,
    clients_elsewhere=0,
    clock=4,
    tunnel_mtu=1450,
    tcp_mss=1410,
    leaked_packets=0,
    reset_packets=3,
    resyncs=0,
    repairs=0,
    networks=(NetworkView("lan", "br-lan", "10.77.0.0/16", "10.77.0.1", 77, "wan", "masquerade"),),
    sysctls=("net.ipv4.ip_forward: 0 -> 1",),
    tunnel_address="100.127.0.1",
    anchors=(ANCHOR,),
    checksum="0123456789ab",
)
PEER = PeerView(
    id="ap2",
    address="10.99.0.2:7411",
    underlay="10.99.0.2",
    state="in-sync",
    reason="",
    sessions=1,
    clients=0,
    epoch=(1 << 56) - 1,
    sequence=12,
    refused=0,
    snapshots=1,
    deltas=5,
    tunnel_address="100.127.0.2",
    checksum="ba9876543210",
    protocol_version=2,
    differences=1,
    changes_received=7,
)
CLIENT = ClientView(
    network="lan",
    mac="02:00:5e:10:00:01",
    addresses=("10.77.0.5",),
    serving_ap="ap1",
    generation=4,
    flows_by_anchor={"ap2": 1, "ap1": 2},
    since_s=12.25,
    roams=(RoamView("ap2", "ap1", 4, "fdb", 1_700_000_000.125, 3),),
)
FLOWS = (
    FlowView(
        "lan", "tcp", "10.77.0.5", 40000, "198.51.100.10", 443, "ap2", "192.0.2.2", 40000,
        CLIENT.mac, "ap1",
    ),
    FlowView(
        "lan", "icmp", "10.77.0.5", 17, "198.51.100.10", 0, "ap1", "192.0.2.1", 17,
        CLIENT.mac, "ap1",
    ),
)  # fmt: skip


class FakeBackend:
    """Knows one client with two flows; `emit` is what the engine would do."""

    def __init__(self) -> None:
        self.shown = STATUS
        self.all_flows: tuple[FlowView, ...] = FLOWS
        self.associated: list[tuple[Mac, IPv4Address | None, NetworkName | None]] = []
        self.watchers: list[tuple[Callable[[AgentEventView], None], bool]] = []
        self.drains = 2
        """Flows that are left; one ends with each look at a draining AP."""
        self.on_watch: Callable[[], None] = lambda: None

    def status(self) -> StatusView:
        (anchor,) = self.shown.anchors
        if anchor.mode == "draining":
            self.drains -= 1
            self.shown = replace(self.shown, anchors=(replace(anchor, flows=max(0, self.drains)),))
        return self.shown

    def degrade(self, **changes: object) -> None:
        self.shown = replace(STATUS, **changes)  # type: ignore[arg-type]

    def peers(self) -> list[PeerView]:
        return [PEER]

    def clients(self) -> list[ClientView]:
        return [CLIENT]

    def client(self, client: Mac | IPv4Address) -> ClientView:
        if str(client) not in (CLIENT.mac, *CLIENT.addresses):
            raise UnknownClient(f"no AP has seen client {client}")
        return CLIENT

    def flows(
        self, client: Mac | IPv4Address | None, anchor: ApId | None, protocol: int | None
    ) -> Iterator[FlowView]:
        if client is not None:
            self.client(client)
        for flow in self.all_flows:
            right_protocol = protocol is None or flow.protocol == PROTOCOL_NAMES[protocol]
            if right_protocol and anchor in (None, flow.anchor):
                yield flow

    def associate(
        self, mac: Mac, address: IPv4Address | None, network: NetworkName | None
    ) -> ClientView:
        if network not in (None, "lan"):
            raise ValueError(f"no network {network!r} is configured here; there is: lan")
        if not self.shown.in_sync:
            raise NotReady("the agent is not in sync yet")
        self.associated.append((mac, address, network))
        return replace(CLIENT, mac=mac)

    def set_drain(self, ap: ApId | None, *, drain: bool) -> StatusView:
        if ap not in (None, "ap1"):
            raise ValueError(f"this is the agent of ap1: ask that of {ap} itself")
        mode = "draining" if drain else "active"
        anchor = replace(ANCHOR, mode=mode, flows=max(0, self.drains), deputy="ap2" * drain)
        self.degrade(anchors=(anchor,))
        return self.status()

    def reclaim(self) -> StatusView:
        raise ValueError("no network here has a NAT address that can move")

    def subscribe(
        self, callback: Callable[[AgentEventView], None], *, flows: bool
    ) -> Callable[[], None]:
        watcher = (callback, flows)
        self.watchers.append(watcher)
        self.on_watch()
        return lambda: self.watchers.remove(watcher)
