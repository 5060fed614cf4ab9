"""Which versions of the feed's protocol this agent speaks, and which one it uses with a peer.

1: snapshots and deltas.
2: sessions in columns; snapshots without what the subscriber shows to hold; what an AP says of
   itself as an anchor.
   A field that a receiver doesn't know does no harm, so a version's new fields needn't be left out.
"""

from __future__ import annotations

HIGHEST = 2
LOWEST = 1
WITH_DIFFERENCES = 2
"""The first version in which a snapshot may leave out what its subscriber holds."""
WITH_COLUMNS = 2
"""The first version in which sessions come in columns."""
WITH_ANCHORS = 2
"""The first version in which an AP says what it is as an anchor."""


def in_use(subscribers_highest: int) -> int | None:
    """The version to answer a subscriber in; None: there is none that both speak."""
    version = min(subscribers_highest, HIGHEST)
    return version if version >= LOWEST else None


def ours() -> str:
    """What we speak, for error texts."""
    return f"versions {LOWEST} to {HIGHEST}" if LOWEST != HIGHEST else f"version {HIGHEST}"
