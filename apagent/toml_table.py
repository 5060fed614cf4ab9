"""A TOML table that is read key by key, each with its type and bounds.

A reader takes what it knows and calls `finish`, which refuses what is left. Every error starts with
the full name of the key, such as `networks[1].prefix`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from apagent.errors import ConfigError


class Table:
    """One table of the file; `path` is its full name ("" for the top)."""

    def __init__(self, data: Mapping[str, Any], path: str = "") -> None:
        self._data = data
        self._path = path
        self._known: set[str] = set()

    def name(self, key: str) -> str:
        """The full name of `key`."""
        return f"{self._path}.{key}" if self._path else key

    def error(self, key: str, text: str) -> ConfigError:
        """A ConfigError that names `key`."""
        return ConfigError(f"{self.name(key)}: {text}")

    def has(self, key: str) -> bool:
        """Whether the file sets `key`."""
        self._known.add(key)
        return key in self._data

    def text(self, key: str, default: str | None = None, *, of: re.Pattern[str], form: str) -> str:
        """A string that matches `of`; `form` describes it in an error."""
        value: str = self._take(key, str, default)
        if not of.fullmatch(value):
            raise self.error(key, f"{value!r} is not usable; expected {form}")
        return value

    def choice(self, key: str, default: str, among: tuple[str, ...]) -> str:
        """One of the strings in `among`."""
        value: str = self._take(key, str, default)
        if value not in among:
            raise self.error(key, f"{value!r} is unknown; choose one of: {', '.join(among)}")
        return value

    def integer(self, key: str, default: int | None, low: int, high: int) -> int:
        """An integer from `low` to `high`."""
        value: int = self._take(key, int, default)
        if not low <= value <= high:
            raise self.error(key, f"{value} is out of range; expected {low} to {high}")
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        """True or false."""
        self._known.add(key)
        value = self._data.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"expected true or false, found {_type_name(type(value))}")
        return value

    def seconds(self, key: str, default: float, low: float, high: float) -> float:
        """A number of seconds from `low` to `high`."""
        value = float(self._take(key, (int, float), default))
        if not low <= value <= high:
            raise self.error(key, f"{value} is out of range; expected {low} to {high} seconds")
        return value

    def address(self, key: str) -> IPv4Address:
        """An IPv4 address."""
        value = self._take(key, str, None)
        try:
            return IPv4Address(value)
        except ValueError:
            raise self.error(key, f"{value!r} is not an IPv4 address such as 10.0.0.1") from None

    def addresses(self, key: str) -> tuple[IPv4Address, ...]:
        """A list of IPv4 addresses; empty if it is absent."""
        values = self._take(key, list, [])
        try:
            return tuple(IPv4Address(value) for value in values)
        except ValueError as error:
            raise self.error(
                key, f'expected a list such as ["192.0.2.1", "192.0.2.2"] ({error})'
            ) from None

    def prefix(self, key: str, default: str | None = None) -> IPv4Network:
        """An IPv4 prefix without host bits."""
        value = self._take(key, str, default)
        try:
            return IPv4Network(value)
        except ValueError as error:
            raise self.error(
                key, f"{value!r} is not an IPv4 prefix such as 10.0.0.0/16 ({error})"
            ) from None

    def table(self, key: str) -> Table:
        """A sub-table; an empty one if it is absent."""
        return Table(self._take(key, dict, {}), self.name(key))

    def tables(self, key: str) -> list[Table]:
        """An array of tables; empty if it is absent."""
        items = self._take(key, list, [])
        for item in items:
            if not isinstance(item, dict):
                raise self.error(key, f"expected tables; write [[{self.name(key)}]]")
        return [Table(item, f"{self.name(key)}[{i}]") for i, item in enumerate(items)]

    def finish(self) -> None:
        """Refuse what no reader has asked for."""
        for key in self._data:
            if key in self._known:
                continue
            close = difflib.get_close_matches(key, self._known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "remove it"
            known = ", ".join(sorted(self._known))
            raise self.error(key, f"unknown key; {hint} (known here: {known})")

    def _take(self, key: str, type_: type | tuple[type, ...], default: Any) -> Any:  # noqa: ANN401
        self._known.add(key)
        if key not in self._data:
            if default is None:
                raise self.error(key, "is missing; set it")
            return default
        value = self._data[key]
        if not isinstance(value, type_) or isinstance(value, bool):
            raise self.error(key, f"expected {_type_name(type_)}, found {_type_name(type(value))}")
        return value


def _type_name(type_: type | tuple[type, ...]) -> str:
    names = {
        str: "a string",
        int: "an integer",
        float: "a number",
        dict: "a table",
        list: "a list",
        bool: "a boolean",
    }
    if isinstance(type_, tuple):
        return "a number"
    return names.get(type_, type_.__name__)
