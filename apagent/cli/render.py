"""The agent's answers on stdout: as an aligned table, one JSON document, or an object a line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, NamedTuple, TypeVar

from google.protobuf.message import Message

_M = TypeVar("_M", bound=Message)


class Output(StrEnum):
    """How to print."""

    TABLE = "table"
    JSON = "json"
    JSONL = "jsonl"


class Column(NamedTuple):
    """A column of a table: its head, and the cell of an item."""

    head: str
    cell: Callable[[Any], object]


def plain(message: Message) -> dict[str, Any]:
    """`message` as JSON would have it: every field by its proto name, numbers as numbers."""
    values: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            values[field.name] = dict(sorted(value.items()))
        elif field.is_repeated:
            values[field.name] = [_plain_value(item) for item in value]
        else:
            values[field.name] = _plain_value(value)
    return values


def print_list(items: Iterable[_M], columns: Sequence[Column], output: Output) -> None:
    """Print `items`: a table of `columns`, a JSON list, or a line each."""
    if output is Output.TABLE:
        print_table(items, columns)
    elif output is Output.JSON:
        print_line(json.dumps([plain(item) for item in items], indent=2))
    else:
        for item in items:
            print_line(json.dumps(plain(item)))


def print_object(item: Message, rows: Sequence[tuple[str, object]], output: Output) -> None:
    """Print one object: `rows` of names and values, or a JSON object."""
    if output is Output.TABLE:
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            print_line(f"{name:<{width}}  {_cell(value)}".rstrip())
    else:
        print_json(plain(item), output)


def print_json(value: dict[str, Any], output: Output) -> None:
    """Print one JSON object: indented, or in a line."""
    print_line(json.dumps(value, indent=None if output is Output.JSONL else 2))


def print_table(items: Iterable[Any], columns: Sequence[Column]) -> None:
    """Print aligned columns under their heads."""
    rows = [[column.head for column in columns]]
    rows.extend([_cell(column.cell(item)) for column in columns] for item in items)
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        print_line("  ".join(cells).rstrip())


def print_line(text: str) -> None:
    """Print a line."""
    sys.stdout.write(text + "\n")


def clock_time(seconds: float) -> str:
    """A moment, in local time with milliseconds."""
    moment = datetime.fromtimestamp(seconds, UTC).astimezone()
    return moment.isoformat(sep=" ", timespec="milliseconds")


def duration(seconds: float) -> str:
    """A time span in its two largest units."""
    whole = int(seconds)
    for unit, size, below, smaller in (("d", 86400, "h", 3600), ("h", 3600, "m", 60)):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // smaller}{below}"
    return f"{whole // 60}m{whole % 60}s" if whole >= 60 else f"{seconds:.1f}s"


def _plain_value(value: Any) -> Any:  # noqa: ANN401 - whatever a protobuf field holds
    return plain(value) if isinstance(value, Message) else value


def _cell(value: object) -> str:
    text = str(value)
    return text or "-"
