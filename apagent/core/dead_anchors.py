"""Anchors that are dead: who continues their flows, and for how long that may take."""

from __future__ import annotations

from apagent.core.anchor_book import AnchorBook
from apagent.core.desired import ANY_ANCHOR, NOBODY
from apagent.core.model import AnchorMode, ApId, NetworkName

PATIENCE_ROUNDS = 20
"""Rounds of probes (2 s) that a dead anchor's flows wait for a successor to begin before they are
ended."""


class DeadAnchors:
    """The dead among the anchors of `book`, and where their flows' packets go."""

    def __init__(self, book: AnchorBook) -> None:
        self.book = book
        self._round = 0
        self._since: dict[tuple[ApId, NetworkName], int] = {}
        """The round since which they are dead and nobody is at work on succeeding them."""

    def pass_round(self) -> bool:
        """A round of probes is over; returns whether anybody still waits for a successor."""
        self._round += 1
        return any(self._round - since <= PATIENCE_ROUNDS for since in self._since.values())

    def diverted(self, network: NetworkName) -> dict[ApId, ApId]:
        """Where the packets of whose flows go instead (`NetworkState.diverted`)."""
        diverted: dict[ApId, ApId] = {}
        deputy = None if self.book.mode(network) is AnchorMode.ACTIVE else self.book.deputy(network)
        if deputy is not None:
            diverted[ANY_ANCHOR] = deputy
        for ap in self.book.domain.peer_by_id:
            heir = self.heir(ap, network) if self.book.is_dead(ap, network) else None
            if heir is not None:
                diverted[ap] = NOBODY if heir == self.book.me else heir
            elif self.is_forsaken(ap, network):
                diverted[ap] = deputy or NOBODY
        return diverted

    def heir(self, ap: ApId, network: NetworkName) -> ApId | None:
        """Who continues the flows of a dead anchor: whoever holds what it held.

        Its own address comes first. Nobody as long as a successor of another address may still be
        on its way: the heir of one doesn't know the flows of the other, and would reset them.
        """
        heirs = [self.book.holder(nat) for nat in self.book.addresses_of(ap, network)]
        taken = [heir for heir in heirs if heir not in (None, ap)]
        if len(taken) < len(heirs) and self._may_be_continued(ap, network):
            return None
        return taken[0] if taken else None

    def _may_be_continued(self, ap: ApId, network: NetworkName) -> bool:
        """Whether a successor of a dead anchor may still be on its way."""
        if self._round - self._since.get((ap, network), self._round) >= PATIENCE_ROUNDS:
            return False
        if not self._is_known(ap):
            # Not heard since our start: what it held isn't known, nor who may succeed it.
            return self.book.takes_over(self.book.me, network)
        return any(
            self.book.successor(nat, ap, None) is not None
            for nat in self.book.addresses_of(ap, network)
            if self.book.holder(nat) in (None, ap)
        )

    def is_forsaken(self, ap: ApId, network: NetworkName) -> bool:
        """Whether a dead anchor's flows are continued by nobody: they are to fail fast.

        `ap` may be ourselves, with a dead uplink.
        """
        if not self.book.is_dead(ap, network) or self.heir(ap, network) is not None:
            return False
        return not self._may_be_continued(ap, network)

    def note_deaths(self) -> None:
        """Note who is dead now, and since when others may begin to succeed it."""
        for ap in (self.book.me, *self.book.domain.peer_by_id):
            for network in self.book.domain.network_by_name:
                if not self.book.is_dead(ap, network):
                    self._since.pop((ap, network), None)
                elif (ap, network) not in self._since or self._is_being_succeeded(ap, network):
                    self._since[ap, network] = self._round

    def _is_being_succeeded(self, ap: ApId, network: NetworkName) -> bool:
        taken = self.book.being_taken(network)
        if not self._is_known(ap):
            return bool(taken)
        return not taken.isdisjoint(self.book.addresses_of(ap, network))

    def _is_known(self, ap: ApId) -> bool:
        return ap in (self.book.me, *self.book.statements)
