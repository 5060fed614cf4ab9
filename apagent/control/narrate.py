"""What watchers are told: effects and flow events as sentences with fields."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from ipaddress import IPv4Address

from apagent.control.views import AgentEventView
from apagent.core.effects import Effect, NoteAnchor, NotePeer, NoteRoam, NoteSync, Publish
from apagent.core.events import Event, PeerDelta
from apagent.core.model import (
    ESTABLISHED,
    STATE,
    ApId,
    Flow,
    Nat,
    NetworkName,
    SessionChanges,
    is_standing,
)
from apagent.shell import describe_anchor, describe_peer, describe_roam, describe_sync


def note_events(effects: list[Effect], now: float) -> Iterator[AgentEventView]:
    """The notes among `effects`; `now` in seconds since the epoch."""
    for effect in effects:
        match effect:
            case NoteRoam():
                yield _roam(effect, now)
            case NotePeer():
                fields = {"peer": effect.peer, "state": effect.state, "reason": effect.reason}
                yield AgentEventView(now, "peer", describe_peer(effect), fields)
            case NoteAnchor():
                fields = {"ap": effect.ap, "state": effect.state, "what": effect.what}
                yield AgentEventView(now, "anchor", describe_anchor(effect), fields)
            case NoteSync():
                fields = {"missing": ",".join(effect.missing)}
                yield AgentEventView(now, "sync", describe_sync(effect), fields)


def flow_events(
    event: Event, effects: list[Effect], me: ApId, now: float
) -> Iterator[AgentEventView]:
    """What has become of flows, one view each: as peers feed it, and as we publish ours."""
    if isinstance(event, PeerDelta):
        yield from _flows(event.tables, event.peer, now)
    for effect in effects:
        if isinstance(effect, Publish):
            yield from _flows(effect.tables, me, now)


def _roam(note: NoteRoam, now: float) -> AgentEventView:
    kind = "roam" if note.from_ap and note.to_ap else "client"
    fields = {
        "network": str(note.network),
        "client": str(note.mac),
        "addresses": ",".join(map(str, note.addresses)),
        "from": note.from_ap or "",
        "to": note.to_ap or "",
        "generation": str(note.generation),
        "source": note.source,
        "flows_kept": str(note.flows_kept),
    }
    return AgentEventView(now, kind, describe_roam(note), fields)


def _flows(
    tables: Mapping[NetworkName, SessionChanges], anchor: ApId, now: float
) -> Iterator[AgentEventView]:
    for network, changes in tables.items():
        for key, nat in changes.items():
            if is_standing(key):
                continue
            flow, verb = Flow.of(key), _happened(nat)
            fields = {
                "network": str(network),
                "client": str(IPv4Address(key[:4])),
                "flow": str(flow),
                "anchor": str(anchor),
            }
            text = f"flow {verb} at {anchor}: {flow}"
            yield AgentEventView(now, f"flow-{verb}", text, fields)


def _happened(nat: Nat | None) -> str:
    """What a change of a session says of its flow."""
    if nat is None:
        return "closed"
    return "established" if nat[STATE] & ESTABLISHED else "opened"
