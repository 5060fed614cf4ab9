"""A picture of how cost grows: lines over a logarithmic axis, as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 860, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 210, 40, 50
_COLOURS = ("#1f6fd1", "#c8452f", "#2c8a4b", "#8a4fc0")


def lines_chart(title: str, lines: Mapping[str, Points], x_name: str, y_name: str) -> str:
    """One line each; x is logarithmic, y begins at 0."""
    xs = sorted({x for points in lines.values() for x, _ in points})
    top = 1.15 * max(y for points in lines.values() for _, y in points)
    parts = [*_axes(title, xs, top, x_name, y_name)]
    for number, (name, points) in enumerate(lines.items()):
        parts += _line(number, name, [(_x(x, xs), _y(y, top)) for x, y in points])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="#333">'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _x(value: float, xs: Sequence[float]) -> float:
    low, high = math.log10(xs[0]), math.log10(xs[-1])
    share = (math.log10(value) - low) / (high - low) if high > low else 0.5
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _y(value: float, top: float) -> float:
    return _HEIGHT - _BOTTOM - value / top * (_HEIGHT - _TOP - _BOTTOM)


def _axes(title: str, xs: Sequence[float], top: float, x_name: str, y_name: str) -> Iterator[str]:
    yield f'<text x="{_LEFT}" y="22" font-size="15" font-weight="600">{escape(title)}</text>'
    for tenth in range(0, 11, 2):
        value = top * tenth / 10
        y = _y(value, top)
        yield f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        yield f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>'
    for value in xs:
        place = f'x="{_x(value, xs):.1f}" y="{_HEIGHT - _BOTTOM + 20}" text-anchor="middle"'
        yield f"<text {place}>{value:,.0f}</text>"
    yield f'<text x="{_LEFT}" y="{_HEIGHT - 10}">{escape(x_name)}; {escape(y_name)}</text>'


def _line(number: int, name: str, points: Points) -> Iterator[str]:
    colour = _COLOURS[number % len(_COLOURS)]
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    yield f'<polyline points="{corners}" fill="none" stroke="{colour}" stroke-width="1.8"/>'
    for x, y in points:
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
    y = _TOP + 20 * number
    yield (
        f'<rect x="{_WIDTH - _RIGHT + 14}" y="{y - 9}" width="12" height="4" fill="{colour}"/>'
        f'<text x="{_WIDTH - _RIGHT + 32}" y="{y - 3}">{escape(name)}</text>'
    )
