"""A TOML table that is read key by key, each with its type and bounds.

A reader first says with `expect` what it knows: anything else is refused before a required key is
missed, since it may be that key, misspelt. Every error starts with the full name of the key, such
as `networks[1].prefix`.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from apagent.errors import ConfigError


class Table:
    """One table of the file; `path` is its full name ("" for the top).

    `around` are the keys of the table that it is in.
    """

    def __init__(
        self, data: Mapping[str, Any], path: str = "", around: tuple[str, ...] = ()
    ) -> None:
        self._data = data
        self._path = path
        self._around = around
        self._known: tuple[str, ...] = ()

    def name(self, key: str) -> str:
        """The full name of `key`."""
        return f"{self._path}.{key}" if self._path else key

    def error(self, key: str, text: str) -> ConfigError:
        """A ConfigError that names `key`."""
        return ConfigError(f"{self.name(key)}: {text}")

    def has(self, key: str) -> bool:
        """Whether the file sets `key`."""
        self._check_known(key)
        return key in self._data

    def expect(self, *keys: str) -> None:
        """The keys that may be here. Call it before any other; refuses what else is here."""
        self._known = keys
        for key in self._data:
            if key in keys:
                continue
            known = f"(known here: {', '.join(sorted(keys))})"
            raise self.error(key, f"unknown key; {self._hint(key)} {known}")

    def _hint(self, key: str) -> str:
        """What to do about a key that isn't known."""
        outer = self._path.rpartition(".")[0]
        if outer and key in self._around:
            # In TOML whatever stands behind the head of a table is in it.
            return f"it belongs to {outer}: write it before [[{_head(self._path)}]]"
        close = difflib.get_close_matches(key.lower(), self._known, n=1)
        return f"did you mean {close[0]!r}?" if close else "remove it"

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
        self._check_known(key)
        value = self._data.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"expected true or false, found {_type_name(type(value))}")
        return value

    def seconds(self, key: str, default: float, low: float, high: float) -> float:
        """A number of seconds from `low` to `high`."""
        value: int | float = self._take(key, (int, float), default)
        if not low <= value <= high:
            raise self.error(key, f"{value} is out of range; expected {low:g} to {high:g} seconds")
        return float(value)

    def address(self, key: str) -> IPv4Address:
        """An IPv4 address."""
        value = self._take(key, str, None)
        try:
            return IPv4Address(value)
        except ValueError as error:
            raise self.error(
                key, f"{value!r} is not an IPv4 address such as 10.0.0.1 ({error})"
            ) from None

    def addresses(self, key: str) -> tuple[IPv4Address, ...]:
        """A list of IPv4 addresses; empty if it is absent."""
        values = self._take(key, list, [])
        try:
            # As text: a number would be taken for an address, too.
            return tuple(IPv4Address(str(value)) for value in values)
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
            why = f"{value!r} is not an IPv4 prefix such as 10.0.0.0/16 ({error})"
            with contextlib.suppress(ValueError):
                why += f"; did you mean {IPv4Network(value, strict=False)}?"
            raise self.error(key, why) from None

    def table(self, key: str) -> Table:
        """A sub-table; an empty one if it is absent."""
        if isinstance(self._data.get(key), list):
            raise self.error(key, f"there is only one; write [{_head(self.name(key))}]")
        return Table(self._take(key, dict, {}), self.name(key), self._known)

    def tables(self, key: str) -> list[Table]:
        """An array of tables; empty if it is absent."""
        if isinstance(self._data.get(key), dict):
            raise self.error(key, f"there may be several; write [[{_head(self.name(key))}]]")
        items = self._take(key, list, [])
        for item in items:
            if not isinstance(item, dict):
                raise self.error(key, f"expected tables; write [[{_head(self.name(key))}]]")
        return [Table(item, f"{self.name(key)}[{i}]", self._known) for i, item in enumerate(items)]

    def _take(self, key: str, type_: type | tuple[type, ...], default: Any) -> Any:  # noqa: ANN401
        self._check_known(key)
        if key not in self._data:
            if default is None:
                raise self.error(key, "is missing; set it")
            return default
        value = self._data[key]
        if not isinstance(value, type_) or isinstance(value, bool):
            raise self.error(key, f"expected {_type_name(type_)}, found {_type_name(type(value))}")
        return value

    def _check_known(self, key: str) -> None:
        if key not in self._known:
            raise LookupError(f"{self.name(key)} is read, but wasn't expected")


def _head(path: str) -> str:
    """What stands between the brackets of a table's head: no places in lists."""
    return re.sub(r"\[\d+\]", "", path)


def _type_name(type_: type | tuple[type, ...]) -> str:
    names = {
        str: "a string",
        int: "an integer",
        float: "a decimal number",
        dict: "a table",
        list: "a list",
        bool: "a boolean",
    }
    if isinstance(type_, tuple):
        return "a number"
    return names.get(type_, type_.__name__)
