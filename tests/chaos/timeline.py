"""When what was so: the truth about a run, from what was done in it and when.

Seconds since the start. What has begun counts from the moment in which it was begun, and what has
ended until its end was done, so a span may be a little longer than the truth, never shorter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from apagent.lab.faults import Way
from tests.chaos.holders import Holdings
from tests.chaos.schedule import Fault, Roam, Trouble
from tests.chaos.spans import Spans, spans, union

Stay = tuple[str, float, float]
"""An AP, from when to when."""


class What(StrEnum):
    """What was done."""

    BEGIN = "begin"
    """A fault has begun."""
    END = "end"
    """It is over."""
    READY = "ready"
    """The agent of `ap` says that it is in sync, or has gone on after a freeze."""
    ROAM = "roam"


@dataclass(frozen=True, slots=True)
class Done:
    """A thing that was done, from when to when."""

    what: What
    begun: float
    done: float
    fault: Fault | None = None
    roam: Roam | None = None
    ap: str = ""


CARRIER_S = 1.2
"""A carrier that is back is noticed up to a second late (linkwatch, net/core/link_watch.c)."""

_TUNNELS = frozenset({Way.TUNNEL, Way.BACKHAUL})
_CONTROLS = frozenset({Way.CONTROL, Way.SUBSCRIPTION, Way.BACKHAUL})
_WITHOUT_AGENT = frozenset({Trouble.KILL, Trouble.STOP, Trouble.FREEZE, Trouble.POWER})


class Timeline:
    """Spans by AP, by pair of APs, and by client."""

    def __init__(
        self,
        homes: Mapping[str, str],
        aps: Iterable[str],
        done: Iterable[Done],
        holders: Sequence[tuple[float, Holdings]] = (),
    ) -> None:
        self.aps = tuple(aps)
        self._holders = holders
        self._done = sorted(done, key=lambda one: one.begun)
        self.off = {ap: self._troubled(ap, {Trouble.POWER}) for ap in self.aps}
        """Without power."""
        self.uplink_down = {
            ap: self._troubled(ap, {Trouble.UPLINK}) | self.off[ap] for ap in self.aps
        }
        self.draining = {ap: self._troubled(ap, {Trouble.DRAIN}) for ap in self.aps}
        self.flushed = {ap: self._troubled(ap, {Trouble.FLUSH}) for ap in self.aps}
        self.mute = {ap: self._mute(ap) for ap in self.aps}
        """Without an agent that is at work and in sync."""
        self._stays = {client: self._stays_of(client, home) for client, home in homes.items()}

    def stays(self, client: str) -> list[Stay]:
        """At which AP a client was, from when to when."""
        return self._stays[client]

    def at(self, client: str, ap: str) -> Spans:
        """When a client was at an AP."""
        return spans((begin, end) for where, begin, end in self.stays(client) if where == ap)

    def held(self, address: str) -> list[Stay]:
        """Which APs had a NAT address that can move, from when to when."""
        ends = [*(at for at, _ in self._holders[1:]), math.inf]
        return [
            (ap, *span)
            for ap in self.aps
            for span in spans(
                (at, end)
                for (at, held), end in zip(self._holders, ends, strict=True)
                if ap in held.get(address, ())
            )
        ]

    def tunnel_cut(self, one: str, two: str) -> Spans:
        """When a packet, or its answer, couldn't pass between two APs that had power."""
        return self._cut(one, two, _TUNNELS)

    def control_cut(self, one: str, two: str) -> Spans:
        """When the agents of two APs couldn't speak to each other, or one was not at work."""
        return self._cut(one, two, _CONTROLS) | self.mute[one] | self.mute[two]

    def _cut(self, one: str, two: str, ways: frozenset[Way]) -> Spans:
        pairs = {(one, two), (two, one)}
        return union(
            self._spans_of(fault).grown(after=CARRIER_S if fault.trouble is Trouble.CABLE else 0.0)
            for fault in self._faults()
            if any((a, b) in pairs and way in ways for a, b, way in fault.cuts)
        )

    def _troubled(self, ap: str, troubles: set[Trouble]) -> Spans:
        return union(
            self._spans_of(fault)
            for fault in self._faults()
            if fault.ap == ap and fault.trouble in troubles
        )

    def _mute(self, ap: str) -> Spans:
        begins = [
            one.begun
            for one in self._done
            if one.what is What.BEGIN
            and one.fault is not None
            and one.fault.ap == ap
            and one.fault.trouble in _WITHOUT_AGENT
        ]
        ready = [one.done for one in self._done if one.what is What.READY and one.ap == ap]
        return spans(
            (begin, min((at for at in ready if at > begin), default=math.inf)) for begin in begins
        )

    def _faults(self) -> list[Fault]:
        return [one.fault for one in self._done if one.what is What.BEGIN and one.fault is not None]

    def _spans_of(self, fault: Fault) -> Spans:
        mine = [one for one in self._done if one.fault == fault]
        begin = min(one.begun for one in mine if one.what is What.BEGIN)
        end = max((one.done for one in mine if one.what is What.END), default=math.inf)
        return spans([(begin, end)])

    def _stays_of(self, client: str, home: str) -> list[Stay]:
        roams = [
            (one.begun, one.roam.ap)
            for one in self._done
            if one.roam is not None and one.roam.client == client
        ]
        moves = [(-math.inf, home), *roams]
        ends = [*(at for at, _ in roams), math.inf]
        return [(ap, begin, end) for (begin, ap), end in zip(moves, ends, strict=True)]
