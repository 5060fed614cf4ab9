"""What of each answer a person sees in a table, and how; JSON has all of it."""

from __future__ import annotations

from apagent.cli.render import Column, clock_time, duration
from apagent.v1 import control_pb2 as pb


def _by_anchor(client: pb.Client) -> str:
    return ", ".join(f"{ap}: {count}" for ap, count in sorted(client.flows_by_anchor.items()))


def _socket(address: str, port: int) -> str:
    return f"{address}:{port}" if address else ""


def _remote(flow: pb.FlowView) -> str:
    return flow.remote if flow.protocol == "icmp" else _socket(flow.remote, flow.remote_port)


PEER_COLUMNS = (
    Column("PEER", lambda peer: peer.id),
    Column("STATE", lambda peer: peer.state),
    Column("TUNNEL", lambda peer: peer.tunnel),
    Column("MODE", lambda peer: peer.mode),
    Column("SESSIONS", lambda peer: peer.sessions),
    Column("CHECKSUM", lambda peer: peer.checksum),
    Column("CLIENTS", lambda peer: peer.clients),
    Column("FEED", lambda peer: f"v{peer.protocol_version}" if peer.protocol_version else ""),
    Column("ADDRESS", lambda peer: peer.address),
    Column("UNDERLAY", lambda peer: peer.underlay),
    Column("REFUSED", lambda peer: peer.refused),
    Column("REASON", lambda peer: peer.reason),
)
CLIENT_COLUMNS = (
    Column("MAC", lambda client: client.mac),
    Column("ADDRESSES", lambda client: ",".join(client.addresses)),
    Column("NETWORK", lambda client: client.network),
    Column("SERVING", lambda client: client.serving_ap),
    Column("SINCE", lambda client: duration(client.since_s)),
    Column("FLOWS", _by_anchor),
)
ROAM_COLUMNS = (
    Column("TIME", lambda roam: clock_time(roam.time)),
    Column("FROM", lambda roam: roam.from_ap),
    Column("TO", lambda roam: roam.to_ap),
    Column("GENERATION", lambda roam: roam.generation),
    Column("SOURCE", lambda roam: roam.source),
    Column("FLOWS KEPT", lambda roam: roam.flows_kept),
)
FLOW_COLUMNS = (
    Column("PROTOCOL", lambda flow: flow.protocol),
    Column("CLIENT", lambda flow: _socket(flow.client, flow.client_port)),
    Column("REMOTE", _remote),
    Column("ANCHOR", lambda flow: flow.anchor),
    Column("SERVING", lambda flow: flow.serving_ap),
    Column("TRANSLATED TO", lambda flow: _socket(flow.nat_address, flow.nat_port)),
    Column("NETWORK", lambda flow: flow.network),
)


def status_rows(status: pb.Status) -> list[tuple[str, object]]:
    """An agent's status as names and values."""
    rows: list[tuple[str, object]] = [
        ("AP", status.ap),
        ("version", status.version),
        ("in sync", "yes" if status.in_sync else "no"),
        *(("degraded", reason) for reason in status.degraded),
        ("uptime", duration(status.uptime_s)),
        ("sessions", f"{status.own_sessions} own, {status.peer_sessions} of peers"),
        ("checksum", f"{status.checksum} of the own ones"),
        ("clients", f"{status.clients_here} here, {status.clients_elsewhere} elsewhere"),
        ("clock", status.clock),
        ("tunnel", f"{status.tunnel_address} mtu {status.tunnel_mtu}, TCP MSS {status.tcp_mss}"),
        ("leaked packets", f"{status.leaked_packets} (dropped)"),
        ("reset packets", status.reset_packets),
        ("conntrack resyncs", status.resyncs),
        ("kernel repairs", status.repairs),
    ]
    rows += [("network", _network(network)) for network in status.networks]
    rows += [("anchor", _anchor(anchor)) for anchor in status.anchors]
    rows += [("sysctl changed", sysctl) for sysctl in status.sysctls]
    return rows


def _network(network: pb.NetworkStatus) -> str:
    return (
        f"{network.name}: {network.prefix} gateway {network.gateway} on "
        f"{network.client_interface}, uplink {network.uplink} ({network.nat}), VNI {network.vni}"
    )


def _anchor(anchor: pb.AnchorStatus) -> str:
    parts = [f"{anchor.network}: {anchor.mode}"]
    if anchor.trouble:
        parts.append(anchor.trouble)
    parts.append(f"{anchor.flows} flows, new ones to {anchor.translates_to}")
    if anchor.deputy:
        parts[-1] = f"{anchor.flows} flows, new ones at {anchor.deputy}"
    if anchor.holds:
        parts.append(f"holds {' '.join(anchor.holds)}")
    return ", ".join(parts)


def client_rows(client: pb.Client) -> list[tuple[str, object]]:
    """A client as names and values, without its roams."""
    return [
        ("mac", client.mac),
        ("addresses", ", ".join(client.addresses)),
        ("network", client.network),
        ("serving AP", client.serving_ap),
        ("since", duration(client.since_s)),
        ("generation", client.generation),
        ("flows by anchor", _by_anchor(client)),
    ]
