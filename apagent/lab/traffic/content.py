"""File content that both ends can make for themselves: pseudo-random bytes by seed and size."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

BLOCK = 1 << 16
"""Bytes that are made at a time."""


def pieces(seed: int, size: int, piece: int) -> Iterator[bytes]:
    """The content in pieces of at most `piece` bytes; the bytes don't depend on `piece`."""
    for block in _blocks(seed, size):
        for offset in range(0, len(block), piece):
            yield block[offset : offset + piece]


def sha256(seed: int, size: int) -> str:
    """Checksum of the whole content, in hexadecimal."""
    digest = hashlib.sha256()
    for block in _blocks(seed, size):
        digest.update(block)
    return digest.hexdigest()


def _blocks(seed: int, size: int) -> Iterator[bytes]:
    generator = random.Random(seed)
    for offset in range(0, size, BLOCK):
        yield generator.randbytes(min(BLOCK, size - offset))
