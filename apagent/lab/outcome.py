"""The outcome of the demo: what happened to the transfer, without apagent and with it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

BIN_NS = 100_000_000
"""Throughput is shown in bins of this length."""


@dataclass(frozen=True, slots=True)
class Roam:
    """One roam of the client, and what it did to its traffic. Times in ms."""

    from_ap: str
    to_ap: str
    time_ms: float
    """Link up at the new AP, since the start of the transfer."""
    interruption_ms: float | None
    """From link up to the first byte of the transfer; None: no byte ever came."""
    silence_ms: float
    """The longest time without a byte from this roam to the next."""
    echo_interruption_ms: float | None
    """From link up to the answer to the first UDP echo that was sent after it; None: none came."""
    echoes_lost: int
    """Echo requests (one a ms) from this roam to the next that stayed without an answer."""
    flows: int | None
    """Live sessions of the client before the roam; None: there is no agent to ask."""
    flows_kept: int | None
    """How many of them still lived after it."""
    anchor: str | None
    """The AP that anchors the transfer after the roam."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """One download through all the roams."""

    completed: bool
    reason: str
    """Why it did not complete; empty if it did."""
    bytes: int
    sha256_match: bool
    source_addresses: tuple[str, ...]
    """The client's addresses as the server saw them: of the transfer and of every echo."""
    roams: tuple[Roam, ...]
    duration_s: float
    rates_mbit: tuple[float, ...]
    """Mean rate in each whole `BIN_NS`."""


@dataclass(frozen=True)
class Outcome:
    """Both transfers, and where they were measured."""

    without: Transfer
    with_apagent: Transfer
    size: int
    """Of the file, in bytes."""
    rate_mbit: float
    """At which the server sends."""
    took_s: float
    versions: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether the demo showed what it is to show."""
        transfer = self.with_apagent
        return (
            not self.without.completed
            and transfer.completed
            and transfer.sha256_match
            and len(transfer.source_addresses) == 1
        )

    @cached_property
    def verdict(self) -> str:
        """The outcome in a sentence or two."""
        return f"{self._verdict_without()} {self._verdict_with()}"

    def _verdict_without(self) -> str:
        transfer = self.without
        if transfer.completed:
            return "Without apagent the download survived, which it should not have."
        first = transfer.roams[0] if transfer.roams else None
        when = f" after the roam from {first.from_ap} to {first.to_ap}" if first else ""
        return f"Without apagent the download died{when} ({transfer.reason})."

    def _verdict_with(self) -> str:
        transfer = self.with_apagent
        if not transfer.completed:
            return f"With apagent it did not complete either: {transfer.reason}."
        if not transfer.sha256_match:
            return "With apagent it completed, but the checksum is wrong."
        sources = ", ".join(transfer.source_addresses)
        if len(transfer.source_addresses) != 1:
            return f"With apagent it completed, but the server saw several addresses: {sources}."
        return (
            f"With apagent it completed over {len(transfer.roams)} roams, byte for byte, "
            f"and the server saw one address throughout: {sources}."
        )

    def as_json(self) -> dict[str, Any]:
        """The content of report.json."""
        return {
            "passed": self.passed,
            "verdict": self.verdict,
            "size_bytes": self.size,
            "rate_mbit": self.rate_mbit,
            "took_s": round(self.took_s, 1),
            "versions": self.versions,
            "without": _transfer_json(self.without),
            "with": _transfer_json(self.with_apagent),
        }


def _transfer_json(transfer: Transfer) -> dict[str, Any]:
    return {
        "completed": transfer.completed,
        "reason": transfer.reason,
        "bytes": transfer.bytes,
        "sha256_match": transfer.sha256_match,
        "source_addresses": list(transfer.source_addresses),
        "duration_s": round(transfer.duration_s, 3),
        "roams": [_roam_json(roam) for roam in transfer.roams],
        "throughput": {
            "bin_ms": BIN_NS // 1_000_000,
            "mbit": [round(rate, 2) for rate in transfer.rates_mbit],
        },
    }


def _roam_json(roam: Roam) -> dict[str, Any]:
    return {
        "from": roam.from_ap,
        "to": roam.to_ap,
        "time_ms": round(roam.time_ms, 1),
        "interruption_ms": _rounded(roam.interruption_ms),
        "silence_ms": round(roam.silence_ms, 2),
        "echo_interruption_ms": _rounded(roam.echo_interruption_ms),
        "echoes_lost": roam.echoes_lost,
        "flows": roam.flows,
        "flows_kept": roam.flows_kept,
        "anchor": roam.anchor,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
