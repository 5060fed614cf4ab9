"""A picture of a transfer over time, as inline SVG: throughput, and the roams as marked lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from apagent.lab.outcome import BIN_NS, Transfer

WIDTH, HEIGHT = 960, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 30, 28
_BIN_S = BIN_NS / 1e9
_TICKS = (1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000, 2000, 5000)


@dataclass(frozen=True, slots=True)
class Scale:
    """What the axes reach to; both charts share it, so that they can be compared."""

    seconds: float
    mbit: float
    mbit_step: float

    @classmethod
    def of(cls, transfers: Sequence[Transfer]) -> Scale:
        """A scale that holds all of `transfers`."""
        highest = max((max(t.rates_mbit, default=0.0) for t in transfers), default=0.0)
        step = next((tick for tick in _TICKS if highest / tick <= 4), _TICKS[-1])
        seconds = max((t.duration_s for t in transfers), default=0.0)
        return cls(max(1.0, seconds), step * max(1, -(-highest // step)), step)

    def x(self, seconds: float) -> float:
        """Horizontal place of a time."""
        return _LEFT + seconds / self.seconds * (WIDTH - _LEFT - _RIGHT)

    def y(self, mbit: float) -> float:
        """Vertical place of a rate."""
        return HEIGHT - _BOTTOM - mbit / self.mbit * (HEIGHT - _TOP - _BOTTOM)


def chart(transfer: Transfer, scale: Scale, kind: str, label: str) -> str:
    """The picture; `kind` is the style class, `label` what a screen reader says."""
    parts = [
        *_grid(scale),
        *_silence(transfer, scale),
        *_throughput(transfer, scale),
        *_roams(transfer, scale),
        *_hover(transfer, scale),
    ]
    return (
        f'<svg class="chart {kind}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def _grid(scale: Scale) -> Iterator[str]:
    rate = 0.0
    while rate <= scale.mbit:
        y = scale.y(rate)
        yield f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield (
            f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{rate:g}</text>'
        )
        rate += scale.mbit_step
    step = next(tick for tick in _TICKS if scale.seconds / tick <= 12)
    for second in range(0, int(scale.seconds) + 1, step):
        x, unit = scale.x(second), " s" if second == 0 else ""
        yield (
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">'
            f"{second}{unit}</text>"
        )
    yield '<text class="tick" x="0" y="12">Mbit/s</text>'


def _silence(transfer: Transfer, scale: Scale) -> Iterator[str]:
    """Shade the end of a transfer that gave up: from its last byte on."""
    if transfer.completed:
        return
    bins = len(transfer.rates_mbit)
    while bins and not transfer.rates_mbit[bins - 1]:
        bins -= 1
    x, end = scale.x(bins * _BIN_S), scale.x(transfer.duration_s)
    top, bottom = scale.y(scale.mbit), scale.y(0)
    yield (
        f'<rect class="silence" x="{x:.1f}" y="{top:.1f}" width="{max(0.0, end - x):.1f}" '
        f'height="{bottom - top:.1f}"/>'
    )
    yield (
        f'<text class="note" x="{end + 8:.1f}" y="{(top + bottom) / 2:.1f}">gave up: '
        f"{escape(transfer.reason)}</text>"
    )


def _throughput(transfer: Transfer, scale: Scale) -> Iterator[str]:
    if not transfer.rates_mbit:
        return
    corners = []
    for number, rate in enumerate(transfer.rates_mbit):
        y = scale.y(rate)
        corners += [
            f"{scale.x(number * _BIN_S):.1f},{y:.1f}",
            f"{scale.x((number + 1) * _BIN_S):.1f},{y:.1f}",
        ]
    base, end = scale.y(0), scale.x(len(transfer.rates_mbit) * _BIN_S)
    outline = " ".join(corners)
    yield f'<polygon class="area" points="{_LEFT},{base:.1f} {outline} {end:.1f},{base:.1f}"/>'
    yield f'<polyline class="line" points="{outline}"/>'


def _roams(transfer: Transfer, scale: Scale) -> Iterator[str]:
    for roam in transfer.roams:
        x = scale.x(roam.time_ms / 1000)
        yield (
            f'<line class="roam" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 8}" y2="{scale.y(0):.1f}"/>'
            f'<text class="roam-label" x="{x:.1f}" y="{_TOP - 14}" text-anchor="middle">'
            f"{escape(roam.from_ap)} → {escape(roam.to_ap)}</text>"
        )


def _hover(transfer: Transfer, scale: Scale) -> Iterator[str]:
    """What the pointer meets: a strip for each bin, which names its value."""
    top, height = scale.y(scale.mbit), scale.y(0) - scale.y(scale.mbit)
    width = scale.x(_BIN_S) - scale.x(0)
    for number, rate in enumerate(transfer.rates_mbit):
        yield (
            f'<rect class="bin" x="{scale.x(number * _BIN_S):.1f}" y="{top:.1f}" '
            f'width="{width:.1f}" height="{height:.1f}">'
            f"<title>{number * _BIN_S:.1f} s: {rate:.1f} Mbit/s</title></rect>"
        )
