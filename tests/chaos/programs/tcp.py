"""TCP connections that show what the network does, and little of what TCP adds to it."""

from __future__ import annotations

import contextlib
import socket

_TCP_RTO_MAX_MS = 44
"""Linux 6.15."""
RTO_MAX_MS = 1000


def prepare(connection: socket.socket) -> None:
    """Send at once; and after a break try every second (where the kernel can), not ever later."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.IPPROTO_TCP, _TCP_RTO_MAX_MS, RTO_MAX_MS)
