"""How the peer feed is secured: the only place that opens its ports and its channels.

Today it is not: nothing proves who a peer is, and nothing is encrypted. Until it does mutual TLS,
an agent must listen on loopback or on an underlay that only the roam domain's APs can reach.
"""

from __future__ import annotations

from collections.abc import Sequence

import grpc

from apagent.config import Endpoint
from apagent.errors import NeedsError

Options = Sequence[tuple[str, int]]


def server_port(server: grpc.aio.Server, endpoint: Endpoint) -> int:
    """Open the feed's port on `server`; returns its number (0 in `endpoint`: any free one).

    Raises NeedsError where the address can't be had.
    """
    try:
        return server.add_insecure_port(str(endpoint))
    except RuntimeError as error:
        raise NeedsError(
            f"peering.listen: can't listen on {endpoint}: is the address on this machine, "
            "and the port free?"
        ) from error


def channel(endpoint: Endpoint, options: Options) -> grpc.aio.Channel:
    """A channel to the peer at `endpoint`."""
    return grpc.aio.insecure_channel(str(endpoint), options=options)
