"""How soon a silent partition between two agents is noticed.

TCP alone would wait for many minutes. Both ends send HTTP/2 pings on an idle connection
(https://grpc.github.io/grpc/core/md_doc_keepalive.html) and give it up where no answer comes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Keepalive:
    """Times in milliseconds: silence before a ping, wait for its answer, wait for a connection."""

    idle_ms: int = 2000
    answer_ms: int = 2000
    connect_ms: int = 2000

    @property
    def server_options(self) -> list[tuple[str, int]]:
        """Options of a gRPC server."""
        return [
            *self._pings,
            ("grpc.http2.min_ping_interval_without_data_ms", self.idle_ms // 2),
            ("grpc.http2.max_ping_strikes", 0),
            ("grpc.so_reuseport", 0),
        ]

    @property
    def channel_options(self) -> list[tuple[str, int]]:
        """Options of a gRPC channel that makes one attempt to connect and leaves retries to us."""
        return [
            *self._pings,
            ("grpc.enable_retries", 0),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.min_reconnect_backoff_ms", self.connect_ms),
        ]

    @property
    def _pings(self) -> list[tuple[str, int]]:
        # gRPC 1.85 sends a ping after keepalive_time_ms, but it is ping_timeout_ms (a minute by
        # default) that gives up on the answer.
        return [
            ("grpc.keepalive_time_ms", self.idle_ms),
            ("grpc.keepalive_timeout_ms", self.answer_ms),
            ("grpc.http2.ping_timeout_ms", self.answer_ms),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
        ]


KEEPALIVE = Keepalive()
"""A partition is noticed within five seconds. That costs little where it was none: the feed goes on
from its position."""
