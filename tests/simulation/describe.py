"""Events in a line each, for the trace: short, and the same in every run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields

from apagent.core.events import (
    Event,
    FlowsChanged,
    FlowsListed,
    PeerDelta,
    PeerPart,
    PeerSnapshot,
)
from apagent.core.model import Claim, Flow, FlowKey, Nat, NetworkName, Translation


def describe(event: Event) -> str:
    """What has happened."""
    match event:
        case PeerSnapshot():
            return _words(f"snapshot of {event.peer}, clock {event.clock}", _feed(event))
        case PeerPart():
            return _words(f"part of {event.peer}", _sessions(event.tables))
        case PeerDelta():
            return _words(f"delta of {event.peer}, clock {event.clock}", _feed(event))
        case FlowsChanged():
            return _words("conntrack", _sessions({event.network: event.changes}))
        case FlowsListed():
            return _words("conntrack holds", _sessions(event.tables))
    values = (f"{field.name} {getattr(event, field.name)}" for field in fields(event))
    return _words(type(event).__name__, values)


def _words(what: str, parts: Iterable[str]) -> str:
    return f"{what}: " + ("; ".join(parts) or "nothing")


def _feed(event: PeerSnapshot | PeerDelta) -> Iterator[str]:
    yield from _sessions(event.tables or {})
    yield from map(claim, event.claims)
    if event.anchor is not None:
        yield from (f"{n.network} {n.mode} {n.nat or ''}".strip() for n in event.anchor.networks)
        yield from (
            f"holds {hold.nat.address} since {hold.generation}, offers it to {hold.offered_to}"
            for hold in event.anchor.holds
        )
        yield from (f"ready for {nat.address}" for nat in sorted(event.anchor.ready))
        yield from (f"taking {nat.address}" for nat in sorted(event.anchor.taking))


def _sessions(tables: Mapping[NetworkName, Mapping[FlowKey, Nat | None]]) -> Iterator[str]:
    for changes in tables.values():
        for key, nat in changes.items():
            yield f"{Flow.of(key)} {'ended' if nat is None else f'is {translation(nat)}'}"


def translation(nat: Nat) -> str:
    """A translation, and under which claim it was made."""
    made = Translation.of(nat)
    return f"{made.address}:{made.port} since {made.generation}"


def claim(said: Claim) -> str:
    """What an AP says of a client."""
    state = [word for word in ("released", "outdone", "withdrawn") if getattr(said, word)]
    addresses = [str(address) for address in sorted(said.addresses)]
    return " ".join([said.mac, "at", said.ap, str(said.generation), *addresses, *state])
