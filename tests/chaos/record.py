"""What became of each flow, as its two ends saw it. Seconds since the start of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any

from apagent.lab.plan import NAT_ADDRESSES
from tests.chaos.schedule import Kind
from tests.chaos.spans import Span

Event = Mapping[str, Any]
"""What a program reported."""


@dataclass(frozen=True, slots=True)
class Record:
    """The life of a flow."""

    flow: int
    client: str
    kind: Kind
    asked: float
    """When its client began to open it."""
    opened: float | None
    """When the first answer came; None: never."""
    last: float | None
    """When the last one came."""
    ended: float
    gaps: tuple[Span, ...]
    """Silence in between."""
    seen: tuple[tuple[float, str], ...]
    """Since when the server saw it as which address and port."""
    lost: str
    """Why its client gave it up; empty: it ended as it should."""
    lost_at: float
    port: int = 0

    @property
    def address(self) -> str:
        """What it was translated to first; empty: the server has never seen it."""
        return self.seen[0][1].rpartition(":")[0] if self.seen else ""

    @property
    def moves(self) -> bool:
        """Whether its address can move to another AP."""
        return bool(self.address) and int(IPv4Address(self.address)) > int(NAT_ADDRESSES)

    @property
    def loss(self) -> tuple[float, str] | None:
        """When it was lost, and how; None: it survived.

        What was corrupted is lost, but nothing of what happened explains it.
        """
        if self.opened is None:
            return self.ended, "never opened" + (f" ({self.lost})" if self.lost else "")
        losses = [(self.lost_at, self.lost)] if self.lost else []
        if len(self.seen) > 1:
            at, address = self.seen[1]
            losses.append((at, f"moved from {self.seen[0][1]} to {address}"))
        return min(losses, default=None)

    @property
    def is_broken(self) -> bool:
        """Whether something came in that was not sent."""
        return "Broken" in self.lost

    def progressed_within(self, begin: float, end: float) -> bool:
        """Whether anything came back then (as far as silence was noted)."""
        if self.opened is None or self.last is None or end <= begin:
            return False
        if self.last < begin or self.opened > end:
            return False
        return not any(gap[0] < begin and end < gap[1] for gap in self.gaps)

    def silent_since(self, moment: float) -> float:
        """When the silence before `moment` began; `moment` itself if there was none."""
        if self.last is not None and self.last < moment:
            return self.last
        return next((begin for begin, end in self.gaps if begin < moment <= end + 0.01), moment)


def records(
    kinds: Mapping[int, Kind], flows: Iterable[Event], server: Iterable[Event], start_ns: int
) -> list[Record]:
    """Join what both ends have reported."""
    seen: dict[int, list[tuple[float, str]]] = {}
    broken: dict[int, str] = {}
    for event in server:
        if event["event"] == "seen":
            at = (event["time_ns"] - start_ns) / 1e9
            seen.setdefault(event["flow"], []).append((at, event["address"]))
        elif event["event"] == "broken":
            broken[event["flow"]] = f"Broken: {event['reason']}"
    return [
        _record(kinds[flow["flow"]], flow, seen, broken, start_ns)
        for flow in sorted(flows, key=lambda flow: int(flow["flow"]))
    ]


def _record(
    kind: Kind,
    flow: Event,
    seen: Mapping[int, list[tuple[float, str]]],
    broken: Mapping[int, str],
    start_ns: int,
) -> Record:
    def at(time_ns: int) -> float:
        return (time_ns - start_ns) / 1e9

    number = flow["flow"]
    return Record(
        number,
        flow["client"],
        kind,
        asked=at(flow["asked_ns"]),
        opened=at(flow["opened_ns"]) if flow["opened_ns"] else None,
        last=at(flow["last_ns"]) if flow["last_ns"] else None,
        ended=at(flow["ended_ns"]),
        gaps=tuple((at(begin), at(end)) for begin, end in flow["gaps_ns"]),
        seen=tuple(seen.get(number, ())),
        lost=broken.get(number) or flow["lost"],
        lost_at=at(flow["lost_ns"] or flow["ended_ns"]),
        port=flow["port"],
    )
