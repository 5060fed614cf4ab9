"""Whether an AP's flows could go on at another one when it was lost.

The successor is the first AP in the order of the domain (rendezvous hashing) that all others count
as fit: with power, agent and uplink, and not drained. An AP that had been unfit for a while is
passed over. One that becomes unfit or fit in these very seconds may or may not be counted on:
nothing is expected then.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address

from apagent.core.anchor_book import _weight
from apagent.core.model import ApId, NatAddress, NetworkName
from apagent.lab.plan import NAT_ADDRESSES, NETWORKS
from tests.chaos.spans import Span, Spans, union
from tests.chaos.timeline import Timeline

BEFORE_S, AFTER_S = 1.0, 3.0
"""Around the loss of an AP: what matters for its succession."""
KNOWN_S = 4.0
"""After so long everybody knows that an AP is unfit: a partition or a freeze is noticed by then."""
FIT_S = 2.0
"""After a trouble has ended, until everybody counts on an AP again."""


class Succession:
    """Of one NAT address."""

    def __init__(self, address: str, timeline: Timeline) -> None:
        self._timeline = timeline
        self._moves = int(IPv4Address(address)) > int(NAT_ADDRESSES)
        nat = NatAddress(NetworkName(NETWORKS[0].name), IPv4Address(address))
        self._order = sorted(timeline.aps, key=lambda ap: _weight(str(nat), ApId(ap)), reverse=True)

    def heir(self, lost: str, at: float) -> str:
        """Who comes first, of those that are not known to be unfit; `lost`: nobody."""
        for ap in self._order:
            known = self._unfit(ap).within(at - KNOWN_S, at + AFTER_S)
            if ap != lost and known.longest() < KNOWN_S + AFTER_S:
                return ap
        return lost

    def why_not(self, client: str, lost: str, at: float, *, lives: bool) -> str:
        """Why nobody could succeed `lost` when it was lost; empty: somebody could.

        One that `lives` has to hand its flows over.
        """
        if not self._moves:
            return "its address can't move"
        heir = self.heir(lost, at)
        if heir == lost:
            return "nobody was there to succeed it"
        around = at - BEFORE_S, at + AFTER_S
        return next(self._obstacles(client, lost, heir, around, lives=lives), "")

    def _obstacles(
        self, client: str, lost: str, heir: str, around: Span, *, lives: bool
    ) -> Iterator[str]:
        timeline = self._timeline
        if self._unfit(heir).grown(after=FIT_S).within(*around):
            yield f"{heir}, which comes after it, was in trouble"
        cut = timeline.control_cut(lost, heir) | timeline.tunnel_cut(lost, heir)
        if lives and cut.grown(after=FIT_S).within(*around):
            yield f"it had no contact with {heir}, which comes after it"
        for ap in timeline.aps:
            if ap in (heir, lost) or not timeline.at(client, ap).within(*around):
                continue
            if timeline.control_cut(ap, heir).grown(after=FIT_S).within(*around):
                yield f"{ap}, which served its client, couldn't hear of {heir}"
            if timeline.tunnel_cut(ap, heir).grown(after=FIT_S).within(*around):
                yield f"{ap}, which served its client, had no tunnel to {heir}"

    def _unfit(self, ap: str) -> Spans:
        timeline = self._timeline
        return union(
            [timeline.off[ap], timeline.mute[ap], timeline.uplink_down[ap], timeline.draining[ap]]
        )
