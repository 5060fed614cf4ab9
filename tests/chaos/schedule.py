"""What is to go wrong, who roams and who talks: all of it from a seed, and the same every time.

Nothing here is done, and nothing is known of what will come of it. Times are seconds since the
start. What can't be survived by anybody isn't planned: two APs at least keep power and uplink; a
client leaves an AP that has lost its power within 1.2 s, as a real one does; and a foreign program
flushes the firewall only where an agent is there to mend it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import permutations
from random import Random

from apagent.lab.faults import Way
from tests.chaos.spans import Span, Spans, spans

WARM_UP_S = 3.0
"""Nothing breaks before: the first flows are opened in peace."""
BOOT_S = 3.0
"""From power until an AP is on the air."""

Cut = tuple[str, str, Way]
"""What passes no more: from which AP, to which one, which packets."""


class Trouble(StrEnum):
    """What happens to an AP or between two."""

    POWER = "power"
    """It loses its power, and boots later."""
    KILL = "kill"
    """Its agent is killed (SIGKILL), and started later."""
    STOP = "stop"
    """Its agent is stopped (SIGTERM), and started later."""
    FREEZE = "freeze"
    """Its agent gets no processor (SIGSTOP), and goes on later."""
    UPLINK = "uplink"
    """The cable of its uplink is pulled, and plugged in later."""
    CABLE = "cable"
    """The cable between it and the other APs is pulled, and plugged in later."""
    PARTITION = "partition"
    """Between it and one other AP or all, in one direction or both, packets of a kind are lost."""
    FLUSH = "flush"
    """Another program flushes the ruleset (`nft flush ruleset`)."""
    DRAIN = "drain"
    """It is drained (`apctl drain`), and undrained later."""


_WEIGHTS = {
    Trouble.POWER: 4,
    Trouble.KILL: 3,
    Trouble.STOP: 1,
    Trouble.FREEZE: 2,
    Trouble.UPLINK: 3,
    Trouble.CABLE: 1,
    Trouble.PARTITION: 4,
    Trouble.FLUSH: 1,
    Trouble.DRAIN: 2,
}
_LASTS_S: dict[Trouble, Span] = {
    Trouble.POWER: (3.0, 8.0),
    Trouble.KILL: (0.2, 4.0),
    Trouble.STOP: (0.2, 2.0),
    Trouble.FREEZE: (0.2, 4.0),
    Trouble.UPLINK: (0.2, 6.0),
    Trouble.CABLE: (0.2, 5.0),
    Trouble.PARTITION: (0.2, 5.0),
    Trouble.FLUSH: (0.0, 0.0),
    Trouble.DRAIN: (2.0, 8.0),
}
_RECOVERS_S: dict[Trouble, float] = {
    Trouble.POWER: BOOT_S,
    Trouble.KILL: 3.0,
    Trouble.STOP: 3.0,
}
"""How long after the end of a trouble an AP is spared those that exclude it."""
_AGENT = frozenset({Trouble.KILL, Trouble.STOP, Trouble.FREEZE})
_EXCLUDES: dict[Trouble, frozenset[Trouble]] = {
    Trouble.POWER: frozenset(Trouble),
    Trouble.KILL: _AGENT | {Trouble.POWER, Trouble.DRAIN, Trouble.FLUSH},
    Trouble.STOP: _AGENT | {Trouble.POWER, Trouble.DRAIN, Trouble.FLUSH},
    Trouble.FREEZE: _AGENT | {Trouble.POWER, Trouble.DRAIN, Trouble.FLUSH},
    Trouble.UPLINK: frozenset({Trouble.POWER, Trouble.UPLINK}),
    Trouble.CABLE: frozenset({Trouble.POWER, Trouble.CABLE}),
    Trouble.PARTITION: frozenset({Trouble.POWER}),
    Trouble.FLUSH: _AGENT | {Trouble.POWER},
    Trouble.DRAIN: _AGENT | {Trouble.POWER, Trouble.DRAIN},
}
"""What doesn't happen to an AP at the same time."""
_DISABLING = frozenset({Trouble.POWER, Trouble.UPLINK, Trouble.DRAIN})
"""Leave an AP with no way to the Internet, or none for new flows."""
_PAUSE_S = (0.8, 4.0)
_ATTEMPTS = 20


@dataclass(frozen=True, slots=True)
class Fault:
    """A trouble of an AP, from when to when, and what can't pass between APs because of it."""

    begin: float
    end: float
    trouble: Trouble
    ap: str
    cuts: tuple[Cut, ...] = ()

    def __str__(self) -> str:
        text = f"{self.trouble} {self.ap}"
        if self.trouble is Trouble.PARTITION:
            text += ": " + ", ".join(f"{a}>{b} {way.name.lower()}" for a, b, way in self.cuts)
        return text


@dataclass(frozen=True, slots=True)
class Roam:
    """A client associates with an AP, its carrier down for a moment or not."""

    at: float
    client: str
    ap: str
    carrier: bool


class Kind(StrEnum):
    """What a flow is."""

    UP = "tcp-up"
    """A connection on which the client sends, and every message is acknowledged."""
    DOWN = "tcp-down"
    """A connection on which the client only listens."""
    UDP = "udp"
    """Datagrams and their echoes."""
    PING = "ping"
    """ICMP echoes."""


_KINDS = {Kind.UP: 3, Kind.DOWN: 3, Kind.UDP: 3, Kind.PING: 1}
_LIVES_S = (4.0, 25.0)
_STAYS = 0.4
"""How many flows stay until the end."""
_DWELL_S = (1.0, 8.0)
_NOTICES_S = (0.2, 1.2)
"""How soon a client leaves an AP that has lost its power."""


@dataclass(frozen=True, slots=True)
class Talk:
    """A flow of a client, from when to when."""

    number: int
    client: str
    kind: Kind
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class Schedule:
    """All of a run."""

    seed: int
    seconds: float
    homes: dict[str, str]
    """Where each client is at the start."""
    faults: tuple[Fault, ...]
    roams: tuple[Roam, ...]
    talks: tuple[Talk, ...]

    def lines(self) -> Iterator[str]:
        """For people: faults and roams in order."""
        told = [(f.begin, f"{f}, for {f.end - f.begin:.2f} s") for f in self.faults]
        told += [
            (r.at, f"{r.client} roams to {r.ap}{', carrier lost' if r.carrier else ''}")
            for r in self.roams
        ]
        yield from (f"{at:7.2f}  {what}" for at, what in sorted(told))


def plan(
    seed: int, seconds: float, homes: dict[str, str], aps: tuple[str, ...], *, calm: bool = False
) -> Schedule:
    """Plan a run: faults until `seconds`, with clients that are at `homes` at the start.

    Where it is to be `calm`, clients roam and nothing else happens.
    """
    faults = () if calm else tuple(_faults(Random(f"{seed} faults"), seconds, aps))
    off = {ap: _off_air(faults, ap) for ap in aps}
    roams = [
        roam
        for client, home in homes.items()
        for roam in _roams(Random(f"{seed} roams {client}"), seconds, client, home, off)
    ]
    talks = [
        Talk(number, *talk)
        for number, talk in enumerate(
            talk
            for client in homes
            for talk in _talks(Random(f"{seed} talks {client}"), seconds, client)
        )
    ]
    return Schedule(
        seed, seconds, homes, faults, tuple(sorted(roams, key=lambda r: r.at)), tuple(talks)
    )


# --- faults


def _faults(random: Random, seconds: float, aps: tuple[str, ...]) -> Iterator[Fault]:
    planned: list[Fault] = []
    at = WARM_UP_S
    while at < seconds:
        for _ in range(_ATTEMPTS):
            fault = _fault(random, at, seconds, aps)
            if _is_possible(fault, planned, aps):
                planned.append(fault)
                yield fault
                break
        at += random.uniform(*_PAUSE_S)


def _fault(random: Random, at: float, seconds: float, aps: tuple[str, ...]) -> Fault:
    trouble = random.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
    ap = random.choice(aps)
    end = min(at + random.uniform(*_LASTS_S[trouble]), seconds)
    return Fault(at, end, trouble, ap, tuple(_cuts(random, trouble, ap, aps)))


def _cuts(random: Random, trouble: Trouble, ap: str, aps: tuple[str, ...]) -> Iterator[Cut]:
    others = [other for other in aps if other != ap]
    if trouble is Trouble.CABLE:
        for other in others:
            yield ap, other, Way.BACKHAUL
            yield other, ap, Way.BACKHAUL
    if trouble is not Trouble.PARTITION:
        return
    if random.random() < 0.6:
        others = [random.choice(others)]
    way = random.choice(list(Way))
    directions = random.choice([(True, False), (False, True), (True, True), (True, True)])
    for other in others:
        for (one, two), wanted in zip(permutations((ap, other)), directions, strict=True):
            if wanted:
                yield one, two, way


def _is_possible(fault: Fault, planned: list[Fault], aps: tuple[str, ...]) -> bool:
    at_once = [other for other in planned if _overlap(fault, other)]
    if any(
        other.ap == fault.ap
        and (other.trouble in _EXCLUDES[fault.trouble] or fault.trouble in _EXCLUDES[other.trouble])
        for other in at_once
    ):
        return False
    if fault.trouble not in _DISABLING:
        return True
    disabled = {other.ap for other in at_once if other.trouble in _DISABLING}
    return len(disabled | {fault.ap}) <= max(1, len(aps) - 2)


def _overlap(one: Fault, two: Fault) -> bool:
    ends = [fault.end + _RECOVERS_S.get(fault.trouble, 0.5) for fault in (one, two)]
    return one.begin <= ends[1] and two.begin <= ends[0]


# --- clients


def _off_air(faults: tuple[Fault, ...], ap: str) -> Spans:
    return spans(
        (f.begin, f.end + BOOT_S) for f in faults if f.ap == ap and f.trouble is Trouble.POWER
    )


def _roams(
    random: Random, seconds: float, client: str, home: str, off: dict[str, Spans]
) -> Iterator[Roam]:
    at, here = 0.0, home
    while True:
        died = min((begin for begin, _ in off[here] if begin + _NOTICES_S[0] >= at), default=None)
        left = at + random.uniform(*_DWELL_S)
        if died is not None and died < left:
            left = max(at, died + random.uniform(*_NOTICES_S))
        if left >= seconds:
            return
        choice = [ap for ap in off if ap != here and not off[ap].at(left)]
        if choice:
            here = random.choice(choice)
            yield Roam(left, client, here, carrier=random.random() < 0.3)
        at = left


def _talks(
    random: Random, seconds: float, client: str, at_once: int = 3
) -> Iterator[tuple[str, Kind, float, float]]:
    for _ in range(at_once):
        at = random.uniform(0.0, 2.0)
        while at < seconds:
            kind = random.choices(list(_KINDS), list(_KINDS.values()))[0]
            end = seconds if random.random() < _STAYS else at + random.uniform(*_LIVES_S)
            yield client, kind, at, min(end, seconds)
            at = end + random.uniform(0.1, 1.0)
