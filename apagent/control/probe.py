"""A call of our own management service, over its socket as `apctl` makes it.

It takes the same machinery as the feeds between agents: gRPC's threads, its completion queue and
the event loop. So it shows that they turn, also where no peer is there.
"""

from __future__ import annotations

from pathlib import Path

import grpc

from apagent.errors import ApagentError
from apagent.v1 import control_pb2 as pb
from apagent.v1 import control_pb2_grpc


class ControlProbe:
    """Calls the service at `path`. It connects at the first call, and stays connected."""

    def __init__(self, path: Path) -> None:
        self._channel = grpc.aio.insecure_channel(f"unix:{path.absolute()}")
        self._stub = control_pb2_grpc.ControlStub(self._channel)

    async def check(self) -> None:
        """Raises ApagentError if the call fails."""
        try:
            await self._stub.ListPeers(pb.ListPeersRequest())
        except grpc.aio.AioRpcError as error:
            raise ApagentError(f"{error.code().name}: {error.details()}") from None

    async def close(self) -> None:
        """Disconnect."""
        await self._channel.close(grace=None)
