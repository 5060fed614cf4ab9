"""Between the feed's messages and the core's words: the only door for peer input.

What a peer sends is untrusted, and every function here that reads it says so in its name. A
statement that the peer may not make is refused by itself, counted and logged; the rest of its
message holds. A message that isn't the peer's own, or that no agent would send, is refused whole:
`PeerFault`, the only exception that peer input raises.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from ipaddress import IPv4Address
from itertools import islice
from typing import NamedTuple

from apagent.core.digest import BUCKETS, FeedDigest
from apagent.core.domain import Network, no_host
from apagent.core.feed import MAX_CHANGES, FeedDelta, FeedSnapshot
from apagent.core.model import (
    AnchorMode,
    AnchorStatement,
    ApId,
    Claim,
    FlowKey,
    Hold,
    Mac,
    Nat,
    NatAddress,
    NetworkAnchor,
    NetworkName,
)
from apagent.errors import PeerFault
from apagent.peers import versions
from apagent.peers.tables import Scope, count_untrusted, read_table_untrusted, table_message
from apagent.v1 import peer_pb2 as pb

GENERATION_LIMIT = 1 << 63
"""Generations and clocks are below it, so that one more always fits the 64 bits on the wire."""
MAX_ADDRESSES = 64
"""Addresses in one claim."""
LOG_INTERVAL_S = 10.0
"""At most one line about refused statements in this time, for each peer."""

MAX_HOLDS = 256
"""NAT addresses of each kind in one statement; there are no more APs than that."""

_MODES = {
    pb.NetworkAnchor.MODE_ACTIVE: AnchorMode.ACTIVE,
    pb.NetworkAnchor.MODE_DRAINING: AnchorMode.DRAINING,
    pb.NetworkAnchor.MODE_NO_UPLINK: AnchorMode.NO_UPLINK,
}
_MODE_NUMBERS = {mode: number for number, mode in _MODES.items()}
_MAC_SIZE = 6
_MAC_GROUP_BIT = 0x01
"""Least significant bit of the first octet: a group address (IEEE 802, clause 8.2)."""

_log = logging.getLogger(__name__)

Tables = dict[NetworkName, dict[FlowKey, Nat | None]]


class Statements(NamedTuple):
    """What a message says, as far as the peer may say it."""

    tables: Tables
    claims: tuple[Claim, ...]
    anchor: AnchorStatement | None = None


class PeerReader:
    """Reads the messages of one peer, and keeps count of what it refused."""

    def __init__(
        self,
        peer: ApId,
        networks: Iterable[Network],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.refused = 0
        """Statements of this peer that were refused."""
        self._peer = peer
        networks = tuple(networks)
        self._scopes = {network.name: Scope.of(network) for network in networks}
        self._movable = {network.name for network in networks if network.takeover}
        self._now = now
        self._quiet_until = 0.0
        self._unlogged = 0

    def read_untrusted(self, message: pb.FeedMessage) -> Statements:
        """What `message` says. Raises PeerFault where it is refused as a whole."""
        self._check_header_untrusted(message)
        tables: Tables = {}
        for table in message.tables:
            scope = self._scopes.get(NetworkName(table.network))
            if scope is None:
                self.refuse(
                    f"sessions of a network {table.network!r:.40} that isn't configured here",
                    count_untrusted(table),
                )
                continue
            changes = tables.setdefault(scope.name, {})
            try:
                read_table_untrusted(table, scope, changes, self.refuse)
            except PeerFault as fault:
                raise PeerFault(f"peer {self._peer}: sent {fault}") from None
        anchor = self._anchor_untrusted(message.anchor) if message.HasField("anchor") else None
        return Statements(tables, tuple(self._claims_untrusted(message)), anchor)

    def _check_header_untrusted(self, message: pb.FeedMessage) -> None:
        if message.ap != self._peer:
            raise PeerFault(
                f"peer {self._peer}: its feed says it is {message.ap!r:.40}: "
                "check the id and the address of this peer in both configurations"
            )
        if not versions.LOWEST <= message.protocol_version <= versions.HIGHEST:
            raise PeerFault(
                f"peer {self._peer}: speaks version {message.protocol_version} of the feed, "
                f"this agent {versions.ours()}: bring both to the same release"
            )
        if message.clock >= GENERATION_LIMIT:
            raise PeerFault(f"peer {self._peer}: its clock {message.clock} is out of range")

    def _claims_untrusted(self, message: pb.FeedMessage) -> Iterator[Claim]:
        for claim in message.claims:
            try:
                yield self._claim_untrusted(claim)
            except PeerFault as fault:
                self.refuse(f"a claim of {claim.mac[:_MAC_SIZE].hex(':')}: {fault}")

    def _claim_untrusted(self, claim: pb.Claim) -> Claim:
        scope = self._scopes.get(NetworkName(claim.network))
        if scope is None:
            raise PeerFault(f"its network {claim.network!r:.40} isn't configured here")
        if claim.generation >= GENERATION_LIMIT:
            raise PeerFault("its generation is out of range")
        if len(claim.addresses) > MAX_ADDRESSES:
            raise PeerFault(f"{len(claim.addresses)} addresses, {MAX_ADDRESSES} may be claimed")
        for address in claim.addresses:
            if not scope.holds(address):
                raise PeerFault(f"{_address(address)} can't be a client of {scope.name}")
        return Claim(
            network=scope.name,
            mac=_mac_untrusted(claim.mac),
            ap=self._peer,
            generation=claim.generation,
            addresses=frozenset(map(IPv4Address, claim.addresses)),
            released=claim.released,
            outdone=claim.outdone,
            withdrawn=claim.withdrawn,
        )

    def _anchor_untrusted(self, anchor: pb.AnchorStatement) -> AnchorStatement:
        return AnchorStatement(
            tuple(self._network_anchors_untrusted(anchor.networks[:MAX_HOLDS])),
            tuple(self._holds_untrusted(anchor.holds[:MAX_HOLDS])),
            frozenset(self._nat_addresses_untrusted(anchor.ready[:MAX_HOLDS])),
            anchor.reclaims,
            frozenset(self._nat_addresses_untrusted(anchor.taking[:MAX_HOLDS])),
        )

    def _network_anchors_untrusted(
        self, networks: Iterable[pb.NetworkAnchor]
    ) -> Iterator[NetworkAnchor]:
        for network in networks:
            scope = self._scopes.get(NetworkName(network.network))
            if scope is None:
                self.refuse(f"to anchor in {network.network!r:.40}, which isn't configured here")
                continue
            nat = pb.NatAddress(network=network.network, address=network.nat)
            movable = self._nat_addresses_untrusted([nat]) if network.nat else iter(())
            address = next((nat.address for nat in movable), None)
            mode = _MODES.get(network.mode, AnchorMode.ACTIVE)
            yield NetworkAnchor(scope.name, mode, address)

    def _holds_untrusted(self, holds: Iterable[pb.Hold]) -> Iterator[Hold]:
        for hold in holds:
            for nat in self._nat_addresses_untrusted([hold.nat]):
                if hold.generation >= GENERATION_LIMIT:
                    self.refuse(f"to hold {nat} with a generation out of range")
                    continue
                offered_to, successor = _ap(hold.offered_to), _ap(hold.successor)
                yield Hold(nat, hold.generation, offered_to, successor)

    def _nat_addresses_untrusted(self, addresses: Iterable[pb.NatAddress]) -> Iterator[NatAddress]:
        """Those that may be a NAT address of a network that lets addresses move."""
        for nat in addresses:
            scope = self._scopes.get(NetworkName(nat.network))
            address = _address(nat.address)
            if scope is None or scope.name not in self._movable:
                self.refuse(f"{address} of {nat.network!r:.40}, which has no takeover here")
            elif scope.covers(nat.address) or no_host(address) or address.is_link_local:
                self.refuse(f"{address}, which can't be a NAT address of {scope.name}")
            else:
                yield NatAddress(scope.name, address)

    def refuse(self, what: str, count: int = 1) -> None:
        """Count `count` refused statements, and log it if that wasn't done just now."""
        self.refused += count
        self._unlogged += count
        now = self._now()
        if now >= self._quiet_until:
            _log.warning(
                "peer %s: refused %d statements it may not make; the latest: %s",
                self._peer,
                self._unlogged,
                what,
            )
            self._quiet_until = now + LOG_INTERVAL_S
            self._unlogged = 0


def held_untrusted(request: pb.WatchRequest) -> FeedDigest | None:
    """What the subscriber shows to hold; None: nothing, or no digests that an agent would send."""
    sessions, generations = request.held.sessions, request.held.generations
    total = len(sessions)
    if not 0 < total <= BUCKETS or total & (total - 1) or len(generations) != total:
        return None
    return FeedDigest(tuple(sessions), tuple(generations))


def digest_message(digest: FeedDigest) -> pb.Digest:
    """`digest` for the one that it is about."""
    return pb.Digest(sessions=digest.sessions, generations=digest.generations)


def delta_message(ap: ApId, version: int, epoch: int, delta: FeedDelta) -> pb.FeedMessage:
    """`delta` of the feed of `ap`, for its subscribers."""
    return pb.FeedMessage(
        kind=pb.FeedMessage.KIND_DELTA,
        ap=ap,
        protocol_version=version,
        epoch=epoch,
        follows=delta.follows,
        sequence=delta.sequence,
        clock=delta.clock,
        tables=[table_message(*table, version) for table in delta.tables.items()],
        claims=[_claim(claim) for claim in delta.claims],
        anchor=_anchor(delta.anchor) if delta.anchor and version >= versions.WITH_ANCHORS else None,
    )


def snapshot_messages(
    ap: ApId, version: int, epoch: int, snapshot: FeedSnapshot
) -> Iterator[pb.FeedMessage]:
    """`snapshot` of the feed of `ap`, in messages of some hundred statements each."""

    def message(kind: pb.FeedMessage.Kind) -> pb.FeedMessage:
        return pb.FeedMessage(
            kind=kind,
            ap=ap,
            protocol_version=version,
            epoch=epoch,
            sequence=snapshot.sequence,
            clock=snapshot.contents.clock,
        )

    for name, sessions in snapshot.pieces():
        part = message(pb.FeedMessage.KIND_SNAPSHOT_PART)
        part.tables.append(table_message(name, sessions, version))
        yield part
    claims = map(_claim, snapshot.contents.claims)
    while some := list(islice(claims, MAX_CHANGES)):
        part = message(pb.FeedMessage.KIND_SNAPSHOT_PART)
        part.claims.extend(some)
        yield part
    last = message(pb.FeedMessage.KIND_SNAPSHOT_END)
    if snapshot.differing is not None:
        last.kind = pb.FeedMessage.KIND_DIFFERENCE_END
        last.differing.extend(sorted(snapshot.differing.numbers))
    if version >= versions.WITH_ANCHORS:
        last.anchor.CopyFrom(_anchor(snapshot.contents.anchor))
    yield last


def _claim(claim: Claim) -> pb.Claim:
    return pb.Claim(
        network=claim.network,
        mac=bytes.fromhex(claim.mac.replace(":", "")),
        generation=claim.generation,
        addresses=sorted(map(int, claim.addresses)),
        released=claim.released,
        outdone=claim.outdone,
        withdrawn=claim.withdrawn,
    )


def _anchor(statement: AnchorStatement) -> pb.AnchorStatement:
    return pb.AnchorStatement(
        networks=[
            pb.NetworkAnchor(
                network=network.network,
                mode=_MODE_NUMBERS[network.mode],
                nat=0 if network.nat is None else int(network.nat),
            )
            for network in statement.networks
        ],
        holds=[
            pb.Hold(
                nat=_nat_address(hold.nat),
                generation=hold.generation,
                offered_to=hold.offered_to or "",
                successor=hold.successor or "",
            )
            for hold in statement.holds
        ],
        ready=map(_nat_address, sorted(statement.ready)),
        reclaims=statement.reclaims,
        taking=map(_nat_address, sorted(statement.taking)),
    )


def _ap(text: str) -> ApId | None:
    return ApId(text) if text else None


def _nat_address(nat: NatAddress) -> pb.NatAddress:
    return pb.NatAddress(network=nat.network, address=int(nat.address))


def _mac_untrusted(mac: bytes) -> Mac:
    if len(mac) != _MAC_SIZE or mac[0] & _MAC_GROUP_BIT or not any(mac):
        raise PeerFault("that is no unicast MAC address")
    return Mac(mac.hex(":"))


def _address(number: int) -> IPv4Address:
    return IPv4Address(number)
