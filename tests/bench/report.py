"""The result of all groups: a table to read, summary.json for programs, Markdown for the docs."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.rows import Row

_TITLE = ("what", "measured", "range", "against", "ratio", "goal", "met")


def machine() -> dict[str, Any]:
    """Where this runs."""
    return {
        "time": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "processor": _processor(),
        "load": [round(load, 2) for load in os.getloadavg()],
        "commit": _commit(),
    }


def write(directory: Path, where: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write summary.json (a list of rows), machine.json (where that was) and summary.md."""
    for name, what in (("summary", [row.json for row in rows]), ("machine", where)):
        file = directory / f"{name}.json"
        file.write_text(json.dumps(what, indent=2) + "\n", encoding="utf-8")
    (directory / "summary.md").write_text(markdown(where, rows), encoding="utf-8")


def markdown(where: dict[str, Any], rows: Sequence[Row]) -> str:
    """The table in Markdown, with a line on the machine."""
    machine_line = (
        f"{where['time']}; Linux {where['kernel']}, Python {where['python']}, "
        f"{where['processors']} x {where['processor']}; load at the end {where['load'][0]}; "
        f"commit {where['commit']}."
    )
    lines = [
        machine_line,
        "",
        "| " + " | ".join(_TITLE) + " |",
        "|" + " --- |" * len(_TITLE),
        *("| " + " | ".join(_cells(row)) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def table(rows: Sequence[Row]) -> str:
    """The table for a terminal."""
    cells = [_TITLE, *map(_cells, rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_TITLE))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def _cells(row: Row) -> tuple[str, ...]:
    against = ""
    if row.against_measured is not None:
        against = f"{row.against} {_number(row.against_measured)}"
    return (
        row.what,
        f"{_number(row.measured)} {row.unit}",
        f"{_number(row.low)} to {_number(row.high)}",
        against,
        "" if row.ratio is None else f"{row.ratio:.3g}",
        row.goal,
        {True: "yes", False: "NO", None: ""}[row.met],
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    argv = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
