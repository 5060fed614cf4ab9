"""The README: its reference of the configuration is whole, and its examples are accepted."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from apagent.config import Config, parse
from apagent.errors import ConfigError
from apagent.toml_table import Table

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE = (ROOT / "deploy" / "systemd" / "agent.toml.example").read_text(encoding="utf-8")
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")

FORWARD = """
[[networks]]
name = "other"
client_interface = "br-other"
prefix = "192.0.2.0/24"
gateway = "192.0.2.1"
vni = 1
uplink = "wan"
[[networks.forwards]]
port = 1
client = "192.0.2.2"
"""
EXAMPLES = re.findall(r"^```toml\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
ROWS = dict(re.findall(r"^\| `([a-z_.\[\]]+)` \| [^|]+ \| ([^|]+) \|", README, re.MULTILINE))
"""The reference: the default of every key, "required", or "derived"."""


def known_keys(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Every key that `parse` expects and reads, by its full name, `[]` for a place in a list."""
    known: set[str] = set()
    expected: set[str] = set()
    expect, check_known = Table.expect, Table._check_known

    def full_name(table: Table, key: str) -> str:
        return re.sub(r"\[\d+\]", "[]", table.name(key))

    def noting_expected(table: Table, *keys: str) -> None:
        expected.update(full_name(table, key) for key in keys)
        expect(table, *keys)

    def noting(table: Table, key: str) -> None:
        known.add(full_name(table, key))
        check_known(table, key)

    with monkeypatch.context() as patch:
        patch.setattr(Table, "expect", noting_expected)
        patch.setattr(Table, "_check_known", noting)
        parse(EXAMPLE + FORWARD)
    assert known == expected
    return {key for key in known if "." in key and key != "networks[].forwards"}


def keys_of_the_example() -> set[str]:
    """The keys in the example for an AP, also those that are commented out."""
    keys, section = set(), ""
    for line in EXAMPLE.splitlines():
        if head := re.fullmatch(r"(?:# )?(\[\[?)([a-z.]+)\]\]?", line):
            section = head[2].replace(".", "[].") + ("[]" if head[1] == "[[" else "")
        elif setting := re.match(r"(?:# )?([a-z_]+) = ", line):
            keys.add(f"{section}.{setting[1]}")
    return keys


def test_the_reference_has_every_key_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ROWS.keys() == known_keys(monkeypatch)


def test_the_example_for_an_ap_has_every_key_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    assert keys_of_the_example() == known_keys(monkeypatch)


def test_the_defaults_of_the_reference_are_the_defaults() -> None:
    defaults = {key: text.strip("` ") for key, text in ROWS.items() if text.startswith("`")}
    assert _with(_required() | defaults) == _with(_required())


def test_what_is_required_is_required() -> None:
    required = _required()
    assert required.keys() == {key for key, text in ROWS.items() if text.strip() == "required"}
    for key in required:
        with pytest.raises(ConfigError, match="is missing"):
            _with({other: value for other, value in required.items() if other != key})


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_are_accepted(example: str) -> None:
    assert parse(example).networks


def test_the_changelog_has_a_place_for_what_is_new() -> None:
    assert "## [Unreleased]" in CHANGELOG


def _required() -> dict[str, str]:
    """Settings of the first example, and of a port forward, that the reference requires."""
    settings = _literals(EXAMPLES[0]) | {
        "networks[].forwards[].port": "1",
        "networks[].forwards[].client": '"10.77.0.2"',
    }
    return {k: v for k, v in settings.items() if ROWS[k].strip() == "required"}


def _literals(text: str) -> dict[str, str]:
    """The settings of an example with one table of each kind, as TOML writes them, by full name."""
    found = {}
    for section, content in tomllib.loads(text).items():
        many = isinstance(content, list)
        for key, value in (content[0] if many else content).items():
            literal = f'"{value}"' if isinstance(value, str) else str(value)
            found[f"{section}{'[]' if many else ''}.{key}"] = literal
    return found


def _with(settings: dict[str, str]) -> Config:
    """The configuration with these settings."""
    tables: dict[str, list[str]] = {}
    for key, literal in settings.items():
        section, _, name = key.rpartition(".")
        tables.setdefault(section, []).append(f"{name} = {literal}")
    # A network comes before what is in it.
    sections = sorted(tables.items())
    return parse("\n".join(f"{_head(section)}\n" + "\n".join(t) for section, t in sections))


def _head(section: str) -> str:
    name = section.replace("[]", "")
    return f"[[{name}]]" if section.endswith("[]") else f"[{name}]"
