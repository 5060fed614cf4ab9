"""Views as messages of control.proto."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from apagent.control.views import AgentEventView, ClientView, FlowView, PeerView, StatusView
from apagent.v1 import control_pb2 as pb


def status_message(view: StatusView) -> pb.Status:
    """The agent as a whole."""
    return pb.Status(**asdict(view))


def peers_message(views: Iterable[PeerView]) -> pb.ListPeersResponse:
    """The peers."""
    return pb.ListPeersResponse(peers=[pb.Peer(**asdict(view)) for view in views])


def clients_message(views: Iterable[ClientView]) -> pb.ListClientsResponse:
    """The clients."""
    return pb.ListClientsResponse(clients=map(client_message, views))


def client_message(view: ClientView) -> pb.Client:
    """One client."""
    return pb.Client(**asdict(view))


def flows_message(views: Iterable[FlowView]) -> pb.FlowList:
    """Some flows."""
    # Spelled out: `asdict` takes four times as long, and there may be a million.
    return pb.FlowList(
        flows=[
            pb.FlowView(
                network=view.network,
                protocol=view.protocol,
                client=view.client,
                client_port=view.client_port,
                remote=view.remote,
                remote_port=view.remote_port,
                anchor=view.anchor,
                nat_address=view.nat_address,
                nat_port=view.nat_port,
                client_mac=view.client_mac,
                serving_ap=view.serving_ap,
            )
            for view in views
        ]
    )


def event_message(view: AgentEventView) -> pb.AgentEvent:
    """One event."""
    return pb.AgentEvent(time=view.time, kind=view.kind, text=view.text, fields=view.fields)
