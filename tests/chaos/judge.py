"""Which flows could not survive, and why: from what truly happened and from each flow's record.

A flow is lost when its connection ends, when the server sees it come from another address, or when
nothing comes back any more, also after all is mended. That is explained by one of these causes, or
it is a fault of apagent's. `A` is the AP that anchored the flow at the time, `S` an AP that served
its client, another one.

1. **A lost its power, or its uplink** (for `UPLINK_S` at least), **and nobody could succeed it**:
   the flow's address doesn't move; or in the order of succession the first AP that wasn't known to
   be unfit was in trouble itself just then; or it couldn't have learned of the flow; or S couldn't
   hear of it, or had no tunnel to it. (`succession.py`)
2. **The tunnel between S and A was cut**, in one direction at least, for `DEAD_S` at least, or for
   `FORSAKEN_S` where S could wait for a successor: S counts A as dead and the flow fails fast.
3. **S couldn't have learned of the flow** when its client was there: since the flow was opened (or
   since S booted), the agents of A and S had not been in contact for `LEARN_S`. They are once both
   are at work and control messages have passed for `CONTACT_S`. S resets it or anchors it anew.
4. **The address has moved to A**, which couldn't have learned of the flow from its former anchor.

A cause explains a loss only if the flow has been silent since then: what has gone on for
`RECOVERY_S` after its end has survived it.

Silence has causes, too: S, A or the AP before S without power, agent or uplink, flushed, or cut off
from another AP. Longer than `SILENCE_S` without them, counted from `RECOVERY_S` after the last of
them has ended, it is a fault like a loss. So is what came in and was never sent, whatever happened.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address

from apagent.lab.plan import UPLINKS
from tests.chaos.record import Record
from tests.chaos.spans import Span, Spans, spans, union
from tests.chaos.succession import Succession
from tests.chaos.timeline import Stay, Timeline

DEAD_S = 0.2
"""A tunnel may be silent for so long: the three probes whose loss makes a peer dead are sent within
two rounds."""
ALIVE_S = 0.5
"""Until a tunnel that passes packets again counts as alive."""
FORSAKEN_S = 1.9
"""The same, with the rounds for which flows wait for a successor, less what a tunnel that passes
packets again takes to count as alive."""
UPLINK_S = 0.3
"""An uplink may be out for so long: five rounds of probes, less what a pull may take to be seen."""
CONTACT_S = 3.0
"""Until two agents have each other again: a connection that is dead is noticed and made anew."""
LEARN_S = 0.5
"""Until a flow that was opened is in the kernels of all APs whose agents are in contact. It takes
milliseconds; the rest is for a machine that carries all of a domain on two cores."""
RECOVERY_S = 3.0
"""Until flows go on after a trouble has ended."""
SILENCE_S = 3.0


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a flow may be lost: what it was, and when."""

    what: str
    when: Spans


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a flow; `why` is empty for what nothing explains."""

    record: Record
    at: float
    how: str
    why: str


def judge(record: Record, timeline: Timeline) -> Verdict | None:
    """Judge a flow; None: it survived, and was never silent without a cause."""
    if record.is_broken:
        return Verdict(record, record.lost_at, record.lost, "")
    loss = record.loss
    if loss is None:
        return _unexplained_silence(record, timeline, math.inf)
    at, how = loss
    cause = _cause(record, timeline, at)
    if cause is None:
        return Verdict(record, at, how, "")
    what, (begin, end) = cause
    why = f"{what}, from {begin:.2f} to {end:.2f}"
    return _unexplained_silence(record, timeline, begin) or Verdict(record, at, how, why)


def _cause(record: Record, timeline: Timeline, at: float) -> tuple[str, Span] | None:
    """The first cause that explains the loss, and when it was so."""
    causes = _unopened(record, timeline) if record.opened is None else _fatal(record, timeline)
    silent = record.silent_since(at)
    for cause in causes:
        for begin, end in cause.when:
            if begin <= at and silent <= end + RECOVERY_S:
                return cause.what, (begin, end)
    return None


def anchors_of(record: Record, timeline: Timeline) -> list[Stay]:
    """The APs that anchored a flow, in order; any may have, if the server has never seen it."""
    if not record.address:
        return [(ap, -math.inf, math.inf) for ap in timeline.aps]
    if not record.moves:
        number = int(IPv4Address(record.address)) - int(UPLINKS[10])
        return [(f"ap{number}", -math.inf, math.inf)]
    held = timeline.held(record.address)
    return sorted(held, key=lambda stay: stay[1:])


# --- causes


def _fatal(record: Record, timeline: Timeline) -> Iterator[Cause]:
    anchors = anchors_of(record, timeline)
    for i, (anchor, begin, end) in enumerate(anchors):
        if end < record.asked:
            continue
        yield from _deaths(record, timeline, anchors[i])
        for ap in timeline.aps:
            if ap != anchor:
                there = timeline.at(record.client, ap).within(max(record.asked, begin), end)
                yield Cause(
                    f"{ap}, which served its client, had no tunnel to its anchor {anchor}",
                    _dead(record, timeline, ap, anchor) & there,
                )
                yield Cause(
                    f"{ap}, which served its client, couldn't have learned of it from {anchor}",
                    ignorance(record, timeline, ap, anchor) & there,
                )
        if i and begin > record.asked and anchors[i - 1][0] != anchor:
            former = anchors[i - 1][0]
            knew = not ignorance(record, timeline, anchor, former).at(begin)
            yield Cause(
                f"its address has moved to {anchor}, which couldn't have learned of it",
                Spans() if knew else spans([(begin - 1.0, end)]),
            )


def _deaths(record: Record, timeline: Timeline, stay: Stay) -> Iterator[Cause]:
    anchor, begin, end = stay
    troubles = {
        "lost its power": timeline.off[anchor],
        "lost its uplink": timeline.uplink_down[anchor].lasting(UPLINK_S) - timeline.off[anchor],
    }
    for what, when in troubles.items():
        for since, until in when:
            if max(begin, record.asked) - 1.0 <= until and since <= end + 1.0:
                succession = Succession(record.address or str(UPLINKS[11]), timeline)
                lives = what == "lost its uplink"
                why_not = succession.why_not(record.client, anchor, since, lives=lives) or (
                    "its successor couldn't have learned of it"
                    if ignorance(record, timeline, succession.heir(anchor, since), anchor).at(since)
                    else ""
                )
                if why_not:
                    yield Cause(f"its anchor {anchor} {what}: {why_not}", spans([(since, until)]))


def _unopened(record: Record, timeline: Timeline) -> Iterator[Cause]:
    """A client gives up what is refused, and nothing else."""
    for ap in timeline.aps:
        there = timeline.at(record.client, ap).within(record.asked - 1, record.ended)
        trouble = _trouble(timeline, ap)
        yield Cause(f"{ap}, which served its client, was in trouble", trouble & there)


def _dead(record: Record, timeline: Timeline, ap: str, anchor: str) -> Spans:
    """When `ap` may have counted `anchor` as dead, and given its flows up."""
    # One that begins before a peer counts as alive again goes on.
    cut = timeline.tunnel_cut(ap, anchor).grown(after=ALIVE_S).grown(after=-ALIVE_S)
    unfit = (timeline.uplink_down[ap] | timeline.draining[ap]).grown(after=1.0)

    def patience(begin: float, end: float) -> float:
        waits = record.moves and not unfit.within(begin, end)
        return FORSAKEN_S if waits else DEAD_S

    def seen(end: float) -> float:
        """When the end of a cut may be seen: an agent that is out of action doesn't see it."""
        out = [until for since, until in timeline.mute[ap] if since <= end + ALIVE_S]
        return max([end, *out[-1:]])

    return spans(
        (begin + patience(begin, end), seen(end) + 1.0)
        for begin, end in cut
        if end - begin >= patience(begin, end)
    )


def ignorance(record: Record, timeline: Timeline, ap: str, anchor: str) -> Spans:
    """When `ap` may not have known a flow of `anchor`."""
    contact = (~timeline.control_cut(ap, anchor)).grown(-CONTACT_S)
    born = record.opened if record.opened is not None else record.asked
    forgot = [record.asked, *(end for _, end in timeline.off[ap] if end > record.asked)]
    return union(spans([(since, _first(contact, max(since, born), LEARN_S))]) for since in forgot)


def _first(when: Spans, since: float, lasting: float) -> float:
    """The end of the first part of `when` after `since` that lasts so long; never: infinity."""
    parts = when.within(since, math.inf).lasting(lasting)
    return min((begin + lasting for begin, _ in parts), default=math.inf)


# --- silence


def _unexplained_silence(record: Record, timeline: Timeline, until: float) -> Verdict | None:
    """Silence without a cause before `until`, where the flow was lost."""
    gaps = list(record.gaps)
    if record.last is not None:
        gaps.append((record.last, record.lost_at if record.lost else record.ended))
    excused = _excuses(record, timeline) if gaps else Spans()
    for begin, end in gaps:
        left = (spans([(begin, min(end, until))]) - excused).lasting(SILENCE_S)
        if left:
            return Verdict(record, begin, f"silent from {begin:.2f} to {end:.2f}", "")
    return None


def _excuses(record: Record, timeline: Timeline) -> Spans:
    served = [
        _trouble(timeline, ap) & spans([(begin, end)]).grown(after=RECOVERY_S)
        for ap, begin, end in [*timeline.stays(record.client), *anchors_of(record, timeline)]
    ]
    return union(served).grown(after=RECOVERY_S)


def _trouble(timeline: Timeline, ap: str) -> Spans:
    """When something was wrong with an AP or between it and others."""
    others = [other for other in timeline.aps if other != ap]
    return union(
        [
            timeline.off[ap],
            timeline.mute[ap],
            timeline.uplink_down[ap],
            timeline.flushed[ap].grown(after=1.0),
            *(timeline.tunnel_cut(ap, other) for other in others),
            *(timeline.control_cut(ap, other) - timeline.mute[other] for other in others),
        ]
    )


def summary(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """How many flows were lost for which kind of cause."""
    found: dict[str, int] = {}
    for verdict in verdicts:
        kind = verdict.why.partition(", from")[0] or "nothing explains it"
        found[kind] = found.get(kind, 0) + 1
    return found
