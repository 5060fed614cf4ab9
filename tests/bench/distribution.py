"""Percentiles, and a picture of distributions: cumulative, one line each, as SVG."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 860, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 230, 40, 46
_TICKS_MS = (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
_COLOURS = ("#1f6fd1", "#c8452f", "#2c8a4b", "#8a4fc0", "#b07d12", "#4a4a4a")


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of all values don't exceed."""
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, int(rank) - 1)]


def cumulative_chart(title: str, curves: Mapping[str, Sequence[float]], limit_ms: float) -> str:
    """How many percent of the values (ms) of each curve lie below a time; `limit_ms` is marked."""
    highest = max(max(values) for values in curves.values())
    end = next((tick for tick in _TICKS_MS if tick >= max(highest, 2 * limit_ms)), highest)
    parts = [*_axes(title, end), *_limit(limit_ms, end)]
    for number, (name, values) in enumerate(curves.items()):
        parts += _curve(number, name, sorted(values), end)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="#333">'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _x(value_ms: float, end_ms: float) -> float:
    return _LEFT + min(value_ms, end_ms) / end_ms * (WIDTH - _LEFT - _RIGHT)


def _y(percent: float) -> float:
    return HEIGHT - _BOTTOM - percent / 100 * (HEIGHT - _TOP - _BOTTOM)


def _axes(title: str, end_ms: float) -> Iterator[str]:
    yield f'<text x="{_LEFT}" y="22" font-size="15" font-weight="600">{escape(title)}</text>'
    for percent in (0, 25, 50, 75, 99):
        y = _y(percent)
        yield f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        yield f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{percent} %</text>'
    for tenth in range(0, 11, 2):
        value = end_ms * tenth / 10
        yield (
            f'<text x="{_x(value, end_ms):.1f}" y="{HEIGHT - _BOTTOM + 20}" text-anchor="middle">'
            f"{value:g}</text>"
        )
    yield f'<text x="{_LEFT}" y="{HEIGHT - 8}">milliseconds</text>'


def _limit(limit_ms: float, end_ms: float) -> Iterator[str]:
    x = _x(limit_ms, end_ms)
    yield (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_y(0):.1f}" stroke="#333" '
        f'stroke-dasharray="4 4"/><text x="{x + 5:.1f}" y="{_TOP + 4}">budget</text>'
    )


def _curve(number: int, name: str, ordered: Sequence[float], end_ms: float) -> Iterator[str]:
    colour = _COLOURS[number % len(_COLOURS)]
    corners = [f"{_x(0, end_ms):.1f},{_y(0):.1f}"]
    for rank, value in enumerate(ordered):
        x = _x(value, end_ms)
        corners += [f"{x:.1f},{_y(100 * share / len(ordered)):.1f}" for share in (rank, rank + 1)]
    yield (
        f'<polyline points="{" ".join(corners)}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
    )
    y = _TOP + 20 * number
    yield (
        f'<rect x="{WIDTH - _RIGHT + 14}" y="{y - 9}" width="12" height="4" fill="{colour}"/>'
        f'<text x="{WIDTH - _RIGHT + 32}" y="{y - 3}">{escape(name)}</text>'
    )
