"""The demo's reports: JSON for programs, one HTML file without outside resources for people."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from pathlib import Path

from apagent.lab.chart import Scale, chart
from apagent.lab.outcome import Outcome, Roam, Transfer

JSON_NAME, HTML_NAME = "report.json", "report.html"

_STYLE = """
:root { color-scheme: light dark; --page: #f9f9f7; --card: #fff; --ink: #16161a; --soft: #5c5b57;
  --rule: #e4e3df; --good: #1f6fd1; --bad: #c8452f; --mark: #16161a; }
@media (prefers-color-scheme: dark) { :root { --page: #121212; --card: #1c1c1b; --ink: #f2f2f0;
  --soft: #b0aea7; --rule: #343432; --good: #5b9cf0; --bad: #f0806b; --mark: #f2f2f0; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 32px 20px 56px; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1000px; margin: 0 auto; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 6px; }
h2 { font-size: 16px; margin: 0 0 2px; }
p { margin: 0 0 10px; max-width: 75ch; }
.soft { color: var(--soft); }
.card p { max-width: none; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: 18px 18px 12px; margin: 18px 0; overflow-x: auto; }
.badge { font-size: 12px; font-weight: 600; padding: 2px 9px; border-radius: 99px;
  border: 1px solid currentcolor; margin-left: 8px; vertical-align: 1px; }
.with .badge { color: var(--good); } .without .badge { color: var(--bad); }
.chart { display: block; width: 100%; min-width: 640px; height: auto; margin-top: 8px;
  font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
.chart.with { --series: var(--good); } .chart.without { --series: var(--bad); }
.grid { stroke: var(--rule); } .tick, .note { fill: var(--soft); }
.area { fill: var(--series); opacity: .16; }
.line { fill: none; stroke: var(--series); stroke-width: 1.6; stroke-linejoin: round; }
.roam { stroke: var(--mark); stroke-dasharray: 3 3; opacity: .6; }
.roam-label { fill: var(--ink); font-weight: 600; }
.silence { fill: var(--series); opacity: .07; }
.bin { fill: transparent; } .bin:hover { fill: var(--ink); opacity: .1; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 600; font-size: 13px; color: var(--soft);
  vertical-align: bottom; }
td { text-align: right; } th:first-child, td:first-child { text-align: left; }
th, td { padding: 6px 10px; border-bottom: 1px solid var(--rule); }
tr:last-child td { border-bottom: 0; }
"""

_HEADINGS = (
    ("roam", ""),
    ("at", "s"),
    ("TCP interruption", "ms"),
    ("UDP interruption", "ms"),
    ("echoes lost", "1 a ms"),
    ("flows kept", ""),
    ("anchor of the download", ""),
)


def write(outcome: Outcome, directory: Path) -> tuple[Path, Path]:
    """Write both reports into `directory`, which is made if need be. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    as_json, as_html = directory / JSON_NAME, directory / HTML_NAME
    as_json.write_text(json.dumps(outcome.as_json(), indent=2) + "\n", encoding="utf-8")
    as_html.write_text(html(outcome), encoding="utf-8")
    return as_json, as_html


def table(outcome: Outcome) -> list[str]:
    """The lines of a table for the terminal: one for each roam with apagent."""
    rows = [
        ("roam", "interruption", "echoes lost", "flows kept", "anchor"),
        *(_line(roam) for roam in outcome.with_apagent.roams),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _line(roam: Roam) -> tuple[str, ...]:
    return (
        f"{roam.from_ap} -> {roam.to_ap}",
        _number(roam.interruption_ms, " ms"),
        str(roam.echoes_lost),
        _kept(roam),
        roam.anchor or "-",
    )


def html(outcome: Outcome) -> str:
    """The whole page."""
    return "".join(_page(outcome))


def _page(outcome: Outcome) -> Iterator[str]:
    scale = Scale.of((outcome.without, outcome.with_apagent))
    yield '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>apagent demo</title><style>{_STYLE}</style></head><body><main>"
    yield "<h1>A download while its client roams</h1>"
    yield f"<p>{escape(outcome.verdict)}</p>"
    yield f'<p class="soft">{escape(_setting(outcome))}</p>'
    yield _card("without", "Without apagent", outcome.without, scale)
    yield _card("with", "With apagent", outcome.with_apagent, scale)
    yield '<section class="card"><h2>Each roam with apagent</h2>'
    yield f'<p class="soft">{escape(_EXPLANATION)}</p>'
    yield f"{_roam_table(outcome.with_apagent)}</section>"
    versions = ", ".join(f"{name} {text}" for name, text in outcome.versions.items())
    yield f'<p class="soft">{escape(versions)}; the demo took {outcome.took_s:.0f} s.</p>'
    yield "</main></body></html>\n"


_EXPLANATION = (
    "Interruption: from link up at the new access point to the first byte of the download that "
    "comes after it, and to the answer to the first UDP echo that is sent after it. Flows kept: of "
    "the client's live sessions before the roam, those that lived on after it."
)


def _setting(outcome: Outcome) -> str:
    return (
        f"Three access points, each with an uplink and a NAT of its own. One client downloads "
        f"{outcome.size / 1e6:.0f} MB, sent at {outcome.rate_mbit:.1f} Mbit/s, and roams from one "
        "to the next. Throughput is the mean over 100 ms, as the client received it."
    )


def _card(kind: str, title: str, transfer: Transfer, scale: Scale) -> str:
    badge = _badge(transfer)
    sources = ", ".join(transfer.source_addresses)
    text = (
        f"{transfer.bytes / 1e6:.1f} MB in {transfer.duration_s:.1f} s; "
        f"source addresses that the server saw: {sources}"
    )
    picture = chart(transfer, scale, kind, f"{title}: throughput over time, {badge}")
    return (
        f'<section class="card {kind}"><h2>{title}<span class="badge">{badge}</span></h2>'
        f'<p class="soft">{escape(text)}</p>{picture}</section>'
    )


def _badge(transfer: Transfer) -> str:
    if not transfer.completed:
        return "died"
    return "completed" if transfer.sha256_match else "wrong checksum"


def _roam_table(transfer: Transfer) -> str:
    head = "".join(f"<th>{name}{f' <br>({unit})' if unit else ''}</th>" for name, unit in _HEADINGS)
    rows = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in _cells(roam))}</tr>"
        for roam in transfer.roams
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _cells(roam: Roam) -> tuple[str, ...]:
    return (
        f"{roam.from_ap} → {roam.to_ap}",
        f"{roam.time_ms / 1000:.1f}",
        _number(roam.interruption_ms),
        _number(roam.echo_interruption_ms),
        str(roam.echoes_lost),
        _kept(roam),
        roam.anchor or "-",
    )


def _kept(roam: Roam) -> str:
    if roam.flows is None or roam.flows_kept is None:
        return "-"
    return f"{roam.flows_kept} of {roam.flows}"


def _number(value: float | None, unit: str = "") -> str:
    return "never" if value is None else f"{value:.1f}{unit}"
