"""A peer's snapshot while its parts come in."""

from __future__ import annotations

from apagent.core.model import ApId, Claim, FlowKey, Nat, NetworkName
from apagent.errors import PeerFault
from apagent.peers.convert import Statements

MAX_SESSIONS = 4_000_000
"""Sessions in one snapshot: about 600 MB here, and far beyond what one AP's conntrack holds."""
MAX_CLAIMS = 1_000_000


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

    def add_untrusted(self, epoch: int, sequence: int, statements: Statements) -> None:
        """Take one part. Raises PeerFault where it doesn't belong to the others, or is too much."""
        if (epoch, sequence) != self._position:
            raise PeerFault(
                f"peer {self._peer}: a snapshot's parts stand at {sequence} of epoch {epoch} and "
                "at {1} of epoch {0}".format(*self._position)
            )
        for network, changes in statements.tables.items():
            table = self.tables.setdefault(network, {})
            for key, nat in changes.items():
                if nat is not None:
                    table[key] = nat
        self.claims.extend(statements.claims)
        sessions = sum(map(len, self.tables.values()))
        if sessions > self._max_sessions or len(self.claims) > MAX_CLAIMS:
            raise PeerFault(
                f"peer {self._peer}: its snapshot is larger than {self._max_sessions} sessions "
                f"or {MAX_CLAIMS} claims"
            )
