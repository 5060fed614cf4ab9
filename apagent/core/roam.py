"""What a sighting of a client means, as a table: every state by every source."""

from __future__ import annotations

from enum import Enum, auto

from apagent.core.clients import Client
from apagent.core.events import ClientSeen, Source
from apagent.core.model import ApId

STRAGGLER_S = 0.1
"""For so long after a client has left, its packets that were still in our queues prove nothing."""


class Where(Enum):
    """Where a client is, as this AP knows it."""

    UNKNOWN = auto()
    HERE = auto()
    ELSEWHERE = auto()


class Verdict(Enum):
    """What to do about a sighting."""

    CLAIM = auto()
    """It is here now: claim it."""
    LEARN = auto()
    """It is here as we know; its address may be news."""
    IGNORE = auto()


SIGHTINGS: dict[tuple[Where, Source], Verdict] = {
    (Where.UNKNOWN, Source.FDB): Verdict.CLAIM,
    (Where.UNKNOWN, Source.NEIGHBOUR): Verdict.CLAIM,
    (Where.UNKNOWN, Source.MANAGEMENT): Verdict.CLAIM,
    (Where.UNKNOWN, Source.DATA): Verdict.CLAIM,
    (Where.HERE, Source.FDB): Verdict.LEARN,
    (Where.HERE, Source.NEIGHBOUR): Verdict.LEARN,
    (Where.HERE, Source.MANAGEMENT): Verdict.LEARN,
    (Where.HERE, Source.DATA): Verdict.LEARN,
    (Where.ELSEWHERE, Source.FDB): Verdict.CLAIM,
    (Where.ELSEWHERE, Source.MANAGEMENT): Verdict.CLAIM,
    (Where.ELSEWHERE, Source.DATA): Verdict.CLAIM,
    # A neighbour entry left behind changes its state by timers long after the client has gone.
    (Where.ELSEWHERE, Source.NEIGHBOUR): Verdict.IGNORE,
}


def where(client: Client | None, me: ApId) -> Where:
    """Where `client` is, as `me` knows it."""
    if client is None:
        return Where.UNKNOWN
    return Where.HERE if client.claim.ap == me else Where.ELSEWHERE


def judge(event: ClientSeen, client: Client | None, me: ApId, now: float) -> Verdict:
    """What the sighting means for what is known of its client (None: nothing).

    `now` is the clock of `Client.since`, in seconds.
    """
    verdict = SIGHTINGS[where(client, me), event.source]
    late = event.source is Source.DATA and client is not None and _just_left(client, me, now)
    return Verdict.IGNORE if late and verdict is Verdict.CLAIM else verdict


def _just_left(client: Client, me: ApId, now: float) -> bool:
    return (
        bool(client.moves)
        and client.moves[0].from_ap == me
        and 0 <= now - client.since < STRAGGLER_S
    )
