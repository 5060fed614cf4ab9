"""What the engine wants done, in the imperative: the shell around it carries it out.

Changes of the kernel's forwarding state are not effects: they are the difference between two states
of the engine (`Engine.take_deltas`), so that they can be coalesced and repeated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Address

from apagent.core.model import (
    AnchorStatement,
    ApId,
    Claim,
    FlowKey,
    Mac,
    NatAddress,
    NetworkName,
    SessionChanges,
    Sessions,
)


@dataclass(frozen=True, slots=True)
class Publish:
    """Append to our feed.

    Sessions that we opened or closed as their anchor, our claims, and what we say of ourselves as
    an anchor, if that has changed.
    """

    tables: Mapping[NetworkName, SessionChanges]
    claims: tuple[Claim, ...]
    clock: int
    anchor: AnchorStatement | None = None


@dataclass(frozen=True, slots=True)
class ForgetClient:
    """Make the bridge and the neighbour table forget a client that another AP serves now.

    Otherwise the bridge would say nothing when the client returns. The clients here are told that
    its addresses are to be found behind the gateway now.
    """

    network: NetworkName
    mac: Mac
    addresses: tuple[IPv4Address, ...]


@dataclass(frozen=True, slots=True)
class AskClient:
    """Ask a client by ARP whether it is here after all; its answer is a sighting.

    We had it here, and another AP claims it. Mostly it has left; but it may have come back before
    we heard of that, and the bridge, which has it still, didn't tell. Or an earlier run has left it
    here: it may have come when nobody was there to claim it, or its claim died with that run.
    """

    network: NetworkName
    mac: Mac
    addresses: tuple[IPv4Address, ...]


class Ending(Enum):
    """Why flows are to end here, in words for the log."""

    LOST = "others have the better right to them"
    MOVED = "the address that they are translated to is not ours"
    FORSAKEN = "our uplink is dead, and nobody continues them"
    OWNED = "their client's address is another client's now"


@dataclass(frozen=True, slots=True)
class EndFlows:
    """Delete our own conntrack entries of these flows. `Engine.still_to_end` judges them anew."""

    network: NetworkName
    flows: tuple[FlowKey, ...]
    why: Ending = Ending.LOST
    owner: Mac | None = None
    """Whose the address is now, if that is why."""


@dataclass(frozen=True, slots=True)
class LoosenFlows:
    """Have conntrack check no windows of these TCP flows of ours any more.

    Another AP is about to take their NAT address. For as long as not all APs know, packets of one
    direction pass there and of the other here, and conntrack takes what acknowledges data that it
    hasn't seen for invalid: that would be dropped.
    """

    flows: tuple[FlowKey, ...]


@dataclass(frozen=True, slots=True)
class WelcomeClient:
    """A client has come to us: make its first packets succeed.

    It is told that the gateway, and behind it the clients `elsewhere`, are here; and for a short
    time packets in mid-connection that match nothing yet are dropped instead of reset, since their
    sessions may still be on their way.
    """

    network: NetworkName
    mac: Mac
    addresses: tuple[IPv4Address, ...]
    elsewhere: tuple[IPv4Address, ...]


@dataclass(frozen=True, slots=True)
class ProbeAddress:
    """Ask on the uplink's segment whether anybody uses a NAT address; `AddressProbed` answers."""

    nat: NatAddress


@dataclass(frozen=True, slots=True)
class DefendAddress:
    """Announce a NAT address of ours again: another machine uses it (RFC 5227, section 2.4)."""

    nat: NatAddress


@dataclass(frozen=True, slots=True)
class AdoptFlows:
    """Put another anchor's flows into our conntrack table.

    Those that are `forwarded` were opened from outside, to a forwarded port. `FlowsAdopted` or
    `AdoptionFailed` answers.
    """

    nat: NatAddress
    sessions: Sessions
    forwarded: frozenset[FlowKey] = frozenset()


@dataclass(frozen=True, slots=True)
class PokeClients:
    """The anchor of these TCP flows is dead, and nobody continues them.

    Their clients, which are served here, are made to send a packet, so that it is reset.
    """

    network: NetworkName
    clients: Mapping[Mac, tuple[FlowKey, ...]]


@dataclass(frozen=True, slots=True)
class NoteAnchor:
    """Tell the watchers: something about an AP as an anchor has changed; `what` is a sentence."""

    ap: ApId
    state: str
    what: str


@dataclass(frozen=True, slots=True)
class NoteRoam:
    """Tell the watchers: a client has a new serving AP (`to_ap` None: it left the domain)."""

    network: NetworkName
    mac: Mac
    addresses: tuple[IPv4Address, ...]
    from_ap: ApId | None
    to_ap: ApId | None
    generation: int
    source: str
    flows_kept: int


@dataclass(frozen=True, slots=True)
class NotePeer:
    """Tell the watchers: a peer's feed changed its state."""

    peer: ApId
    state: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class NoteSync:
    """Tell the watchers and the service manager: we are in sync; `missing` peers were silent."""

    missing: tuple[ApId, ...]


Effect = (
    Publish
    | ForgetClient
    | AskClient
    | EndFlows
    | LoosenFlows
    | WelcomeClient
    | ProbeAddress
    | DefendAddress
    | AdoptFlows
    | PokeClients
    | NoteAnchor
    | NoteRoam
    | NotePeer
    | NoteSync
)
