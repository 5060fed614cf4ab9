"""A peer's snapshot while its parts come in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice

from apagent.core.digest import Buckets
from apagent.core.model import (
    GENERATION,
    ApId,
    Claim,
    FlowKey,
    Nat,
    NetworkName,
    SessionChanges,
    Sessions,
    stamped,
)
from apagent.core.session_tables import SessionTables
from apagent.errors import PeerFault
from apagent.peers.convert import Statements

MAX_SESSIONS = 4_000_000
"""Sessions in one snapshot: about 600 MB here, and far beyond what one AP's conntrack holds."""
MAX_CLAIMS = 1_000_000
MAX_CHANGES = 1024
"""Changes in one piece of what a snapshot's end brings: about 5 ms to apply."""

_NO_GENERATION = bytes(4)


class SnapshotParts:
    """Gathers the parts of one snapshot, within bounds."""

    def __init__(
        self, peer: ApId, epoch: int, sequence: int, max_sessions: int = MAX_SESSIONS
    ) -> None:
        self.tables: dict[NetworkName, dict[FlowKey, Nat]] = {}
        self.claims: list[Claim] = []
        self._peer = peer
        self._position = (epoch, sequence)
        self._max_sessions = max_sessions

    def add_untrusted(
        self, epoch: int, sequence: int, statements: Statements
    ) -> dict[NetworkName, Sessions]:
        """Take one part; returns its sessions.

        Raises PeerFault where it doesn't belong to the others, or is too much.
        """
        if (epoch, sequence) != self._position:
            raise PeerFault(
                f"peer {self._peer}: a snapshot's parts stand at {sequence} of epoch {epoch} and "
                "at {1} of epoch {0}".format(*self._position)
            )
        part: dict[NetworkName, Sessions] = {}
        for network, changes in statements.tables.items():
            opened = {key: nat for key, nat in changes.items() if nat is not None}
            self.tables.setdefault(network, {}).update(opened)
            if opened:
                part[network] = opened
        self.claims.extend(statements.claims)
        sessions = sum(map(len, self.tables.values()))
        if sessions > self._max_sessions or len(self.claims) > MAX_CLAIMS:
            raise PeerFault(
                f"peer {self._peer}: its snapshot is larger than {self._max_sessions} sessions "
                f"or {MAX_CLAIMS} claims"
            )
        return part

    def rest(
        self,
        held: Mapping[NetworkName, SessionTables],
        differing: Buckets,
        *,
        restarted: bool,
    ) -> Iterator[dict[NetworkName, SessionChanges]]:
        """What makes of the tables that we hold, with all parts' sessions in them, the peer's.

        In the buckets that differ, the parts' sessions are all that there is. In the others, what
        we hold stands; if the peer has `restarted`, all that is from before its start, and so of
        no generation.
        """
        if not (differing.numbers or restarted):
            return
        for network, tables in held.items():
            table, said = tables.table(self._peer), self.tables.get(network, {})
            keys = iter(tuple(table))
            while some := tuple(islice(keys, MAX_CHANGES)):
                changes: dict[FlowKey, Nat | None] = {}
                for key in some:
                    nat = table.get(key)
                    if nat is None:
                        continue
                    if differing.hold(key):
                        if key not in said:
                            changes[key] = None
                    elif restarted and nat[GENERATION] != _NO_GENERATION:
                        changes[key] = stamped(nat, 0)
                yield {network: changes}
