"""One line of the result: what was measured, against what, and whether it reaches its goal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One line. `ratio` is measured by against; `met` is None where there is no goal."""

    id: str
    what: str
    measured: float
    unit: str
    low: float
    high: float
    against: str = ""
    against_measured: float | None = None
    ratio: float | None = None
    goal: str = ""
    met: bool | None = None

    @property
    def json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def alone(
    id_: str,
    what: str,
    values: Sequence[float],
    unit: str,
    *,
    at_most: float | None = None,
    at_least: float | None = None,
) -> list[Row]:
    """A row that is measured by itself; none where nothing was measured."""
    if not values:
        return []
    middle = median(values)
    return [
        Row(
            id_,
            what,
            middle,
            unit,
            min(values),
            max(values),
            goal=_goal(at_most, at_least, unit),
            met=_met(middle, at_most, at_least),
        )
    ]


def compared(
    id_: str,
    what: str,
    pairs: Sequence[tuple[float, float]],
    unit: str,
    against: str,
    *,
    ratio_at_most: float | None = None,
    ratio_at_least: float | None = None,
    at_most: float | None = None,
) -> list[Row]:
    """A row of interleaved pairs (measured, against); none where nothing was measured.

    The ratio is that of the medians.
    """
    if not pairs:
        return []
    values = [value for value, _ in pairs]
    measured, other = median(values), median(value for _, value in pairs)
    ratio = measured / other if other else None
    goals = [_goal(at_most, None, unit), _goal(ratio_at_most, ratio_at_least, f"of {against}'s")]
    verdicts = [_met(measured, at_most, None), _met(ratio, ratio_at_most, ratio_at_least)]
    known = [verdict for verdict in verdicts if verdict is not None]
    return [
        Row(
            id_,
            what,
            measured,
            unit,
            min(values),
            max(values),
            against,
            other,
            ratio,
            ", ".join(filter(None, goals)),
            all(known) if known else None,
        )
    ]


def _goal(at_most: float | None, at_least: float | None, unit: str) -> str:
    if at_most is not None:
        return f"at most {at_most:g} {unit}"
    return f"at least {at_least:g} {unit}" if at_least is not None else ""


def _met(value: float | None, at_most: float | None, at_least: float | None) -> bool | None:
    if value is None or (at_most is None and at_least is None):
        return None
    return (at_most is None or value <= at_most) and (at_least is None or value >= at_least)
