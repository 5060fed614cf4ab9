"""The management calls: parse what is asked, ask the backend, answer in messages."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from itertools import islice
from typing import Any, TypeVar

import grpc

from apagent.control.messages import (
    client_message,
    clients_message,
    event_message,
    flows_message,
    peers_message,
    status_message,
)
from apagent.control.notation import parse_address, parse_client, parse_mac
from apagent.control.port import ControlBackend
from apagent.control.views import FlowView
from apagent.control.watch import WatchQueue
from apagent.core.model import PROTOCOL_NUMBERS, ApId, NetworkName
from apagent.errors import ConfigError, NotReady, UnknownClient
from apagent.v1 import control_pb2 as pb
from apagent.v1 import control_pb2_grpc

FLOWS_PER_MESSAGE = 256

_T = TypeVar("_T")
_Context = grpc.aio.ServicerContext[Any, Any]


class ControlServicer(control_pb2_grpc.ControlServicer):
    """Answers from a backend. The methods' names are those of control.proto."""

    def __init__(self, backend: ControlBackend) -> None:
        self._backend = backend

    async def GetStatus(self, _request: pb.GetStatusRequest, _context: _Context) -> pb.Status:  # noqa: N802
        """The agent as a whole."""
        return status_message(self._backend.status())

    async def ListPeers(  # noqa: N802
        self, _request: pb.ListPeersRequest, _context: _Context
    ) -> pb.ListPeersResponse:
        """The peers."""
        return peers_message(self._backend.peers())

    async def ListClients(  # noqa: N802
        self, _request: pb.ListClientsRequest, _context: _Context
    ) -> pb.ListClientsResponse:
        """The clients."""
        return clients_message(self._backend.clients())

    async def GetClient(self, request: pb.GetClientRequest, context: _Context) -> pb.Client:  # noqa: N802
        """One client."""
        view = await _answer(context, lambda: self._backend.client(parse_client(request.client)))
        return client_message(view)

    async def ListFlows(  # noqa: N802
        self, request: pb.ListFlowsRequest, context: _Context
    ) -> AsyncIterator[pb.FlowList]:
        """The sessions that match."""
        flows = await _answer(context, lambda: self._flows(request))
        while some := await _answer(context, lambda: list(islice(flows, FLOWS_PER_MESSAGE))):
            yield flows_message(some)

    async def Associate(self, request: pb.AssociateRequest, context: _Context) -> pb.Client:  # noqa: N802
        """Note that a client is here."""
        view = await _answer(
            context,
            lambda: self._backend.associate(
                parse_mac(request.mac),
                parse_address(request.address) if request.address else None,
                NetworkName(request.network) if request.network else None,
            ),
        )
        return client_message(view)

    async def SetDrain(self, request: pb.SetDrainRequest, context: _Context) -> pb.Status:  # noqa: N802
        """Anchor nothing, or anchor again."""
        ap = ApId(request.ap) if request.ap else None
        drain = request.drain
        view = await _answer(context, lambda: self._backend.set_drain(ap, drain=drain))
        return status_message(view)

    async def Reclaim(self, _request: pb.ReclaimRequest, context: _Context) -> pb.Status:  # noqa: N802
        """Get our own NAT addresses back."""
        return status_message(await _answer(context, self._backend.reclaim))

    async def Watch(  # noqa: N802
        self, request: pb.WatchEventsRequest, context: _Context
    ) -> AsyncIterator[pb.AgentEvent]:
        """Live events from now on."""
        queue = WatchQueue()
        unsubscribe = self._backend.subscribe(queue.put, flows=request.flows)
        try:
            await context.send_initial_metadata(())
            while True:
                yield event_message(await queue.get())
        finally:
            unsubscribe()

    def _flows(self, request: pb.ListFlowsRequest) -> Iterator[FlowView]:
        return self._backend.flows(
            parse_client(request.client) if request.client else None,
            ApId(request.anchor) if request.anchor else None,
            _parse_protocol(request.protocol) if request.protocol else None,
        )


async def _answer(context: _Context, ask: Callable[[], _T]) -> _T:
    """What `ask` returns; its errors become the call's status."""
    try:
        return ask()
    except UnknownClient as error:
        status, text = grpc.StatusCode.NOT_FOUND, str(error)
    except NotReady as error:
        status, text = grpc.StatusCode.FAILED_PRECONDITION, str(error)
    except (ValueError, ConfigError) as error:
        status, text = grpc.StatusCode.INVALID_ARGUMENT, str(error)
    await context.abort(status, text)
    raise AssertionError("abort returned")


def _parse_protocol(text: str) -> int:
    number = PROTOCOL_NUMBERS.get(text.lower())
    if number is None:
        raise ValueError(f"{text!r} is no protocol of a session: {', '.join(PROTOCOL_NUMBERS)}")
    return number
