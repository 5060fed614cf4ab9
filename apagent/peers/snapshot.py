"""A peer's snapshot while its parts come in. Its sessions are those that there is room for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

from apagent.core.digest import Buckets
from apagent.core.model import (
    GENERATION,
    ApId,
    Claim,
    FlowKey,
    Mac,
    Nat,
    NetworkName,
    SessionChanges,
    Sessions,
    stamped,
)
from apagent.core.session_tables import SessionTables
from apagent.errors import PeerFault
from apagent.peers.convert import Statements

MAX_CHANGES = 1024
"""Changes in one piece of what a snapshot's end brings: about 5 ms to apply."""

_NO_GENERATION = bytes(4)


ClientName = tuple[NetworkName, Mac]


class SnapshotParts:
    """Gathers the parts of one snapshot."""

    def __init__(self, peer: ApId, epoch: int, sequence: int, max_claims: int) -> None:
        self.claims: dict[ClientName, Claim] = {}
        self._max_claims = max_claims
        self._beyond = 0
        self._said: dict[NetworkName, set[FlowKey]] = {}
        self._peer = peer
        self._position = (epoch, sequence)

    def add_untrusted(
        self, epoch: int, sequence: int, statements: Statements
    ) -> dict[NetworkName, Sessions]:
        """Take one part; returns its sessions.

        Raises PeerFault where it doesn't belong to the others.
        """
        if (epoch, sequence) != self._position:
            raise PeerFault(
                f"peer {self._peer}: a snapshot's parts stand at {sequence} of epoch {epoch} and "
                "at {1} of epoch {0}".format(*self._position)
            )
        part: dict[NetworkName, Sessions] = {}
        for network, changes in statements.tables.items():
            opened = {key: nat for key, nat in changes.items() if nat is not None}
            self._said.setdefault(network, set()).update(opened)
            if opened:
                part[network] = opened
        for claim in statements.claims:
            client = (claim.network, claim.mac)
            if client in self.claims or len(self.claims) < self._max_claims:
                self.claims[client] = claim
            else:
                self._beyond += 1
        return part

    def take_claims_beyond(self) -> int:
        """How many claims there was no room for since the last call."""
        beyond, self._beyond = self._beyond, 0
        return beyond

    def rest(
        self,
        held: Mapping[NetworkName, SessionTables],
        differing: Buckets | None,
        *,
        restarted: bool,
    ) -> Iterator[dict[NetworkName, SessionChanges]]:
        """What makes of the tables that we hold, with all parts' sessions in them, the peer's.

        In the buckets that differ (None: in all), the parts' sessions are all that there is. In the
        others, what we hold stands; if the peer has `restarted`, all that is from before its start,
        and so of no generation.
        """
        for network, tables in held.items():
            table, said = tables.table(self._peer), self._said.get(network, set())
            if differing is None:
                gone = iter([key for key in table if key not in said])
                while some := tuple(islice(gone, MAX_CHANGES)):
                    yield {network: dict.fromkeys(some)}
            elif differing.numbers or restarted:
                keys = iter(tuple(table))
                while some := tuple(islice(keys, MAX_CHANGES)):
                    closed = {key: None for key in differing.of(some) if key not in said}
                    aged = self._aged(table, differing, some) if restarted else {}
                    yield {network: {**aged, **closed}}

    @staticmethod
    def _aged(
        table: Sessions, differing: Buckets, keys: Iterable[FlowKey]
    ) -> dict[FlowKey, Nat | None]:
        """What stands of these sessions, as the peer says it after its restart."""
        others = set(differing.of(keys))
        standing = {key: table[key] for key in keys if key not in others and key in table}
        return {
            key: stamped(nat, 0)
            for key, nat in standing.items()
            if nat[GENERATION] != _NO_GENERATION
        }
