"""The packets of a voice call: RTP (RFC 3550, 5.1) with G.711 audio, 20 ms a packet."""

from __future__ import annotations

import struct

_HEADER = struct.Struct(">BBHII")
_VERSION_2 = 0x80
_PCMU = 0
"""Payload type of G.711 mu-law (RFC 3551, 6)."""
PACKETS_PER_S = 50
CLOCK_HZ = 8000
SAMPLES = CLOCK_HZ // PACKETS_PER_S
"""Samples a packet, each of them a byte."""
_SEQUENCES = 1 << 16


def packet(sequence: int, source: int) -> bytes:
    """The packet of that number, from 0, of the stream `source` (its SSRC)."""
    header = (_VERSION_2, _PCMU, sequence % _SEQUENCES, sequence * SAMPLES, source)
    return _HEADER.pack(*header) + bytes(SAMPLES)


def read_packet(data: bytes) -> tuple[int, int, int] | None:
    """Sequence number (16 bits), timestamp (samples) and SSRC; None: not a packet of a call."""
    if len(data) != _HEADER.size + SAMPLES:
        return None
    version, kind, sequence, timestamp, source = _HEADER.unpack_from(data)
    return (sequence, timestamp, source) if (version, kind) == (_VERSION_2, _PCMU) else None


def extended(sequence: int, latest: int) -> int:
    """The full number behind 16 bits of it: the one that is nearest to the latest."""
    distance = (sequence - latest + _SEQUENCES // 2) % _SEQUENCES - _SEQUENCES // 2
    return latest + distance
