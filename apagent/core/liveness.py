"""Who answers probes: peers' kernels through the tunnel, and hosts beyond our uplinks.

Time is counted in rounds: one probe each, and who has answered by the next one. A machine that
stalls sends no probes, so that it takes nobody for dead because it was itself asleep.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from apagent.core.model import ApId, NetworkName

ROUND_S = 0.1
"""Seconds from one round of probes to the next."""
ALIVE_AFTER = 3
"""Rounds in a row that a dead peer must answer to count as alive again."""
SILENT_AFTER = 50
"""Rounds after which a peer that has never answered is reported."""
RESTART = 300
"""Rounds that the agent of such a peer has for a restart or an upgrade."""
UPLINK_DEAD_AFTER = 5
"""Rounds in a row that an uplink must be down before its flows are given up: a flap passes."""
UPLINK_WORKS_AFTER = 10
"""Rounds in a row that an uplink must be up before it is used again."""


class Liveness:
    """The peers whose kernels answer. Everybody counts as alive until the probes say otherwise.

    A peer that has never answered, but whose feed is in sync, may have a firewall that drops pings,
    or a release that doesn't answer: it counts as alive for as long as the feed vouches for it, and
    for as long as its agent may need for a restart.
    """

    def __init__(self, peers: Iterable[ApId], dead_after: int) -> None:
        """`dead_after` is the number of rounds in a row without an answer that make a peer dead."""
        self._dead_after = dead_after
        self._missed = dict.fromkeys(peers, 0)
        self._answered = dict.fromkeys(self._missed, 0)
        self._rounds = 0
        self.dead: set[ApId] = set()
        self._silent = set(self._missed)
        self._vouched: set[ApId] = set()

    @property
    def silent(self) -> set[ApId]:
        """Peers that have never answered, in some rounds."""
        return self._silent if self._rounds >= SILENT_AFTER else set()

    def take(self, answered: Collection[ApId], heard: Collection[ApId] = ()) -> set[ApId]:
        """Take a round in; returns the peers that have died or come back by it.

        `heard` are the peers whose feeds are in sync.
        """
        self._rounds += 1
        self._silent.difference_update(answered)
        self._vouched.update(heard)
        changed: set[ApId] = set()
        for peer in self._missed:
            if peer in answered or (peer in self._silent and peer in heard):
                self._missed[peer] = 0
                self._answered[peer] += 1
            else:
                self._missed[peer] += 1
                self._answered[peer] = 0
            if peer in self.dead:
                changes = self._answered[peer] >= ALIVE_AFTER
            else:
                changes = self._missed[peer] >= self._patience(peer)
            if changes:
                changed.add(peer)
        self.dead ^= changed
        return changed

    def _patience(self, peer: ApId) -> int:
        """After how many rounds without an answer it is dead."""
        if peer in self._silent and peer in self._vouched:
            return max(self._dead_after, RESTART)
        return self._dead_after


class Uplinks:
    """Which networks' uplinks work, from what is seen of them each round."""

    def __init__(self, networks: Iterable[NetworkName]) -> None:
        self._streak = dict.fromkeys(networks, 0)
        self.down: dict[NetworkName, str] = {}
        """Those that count as dead, and why."""

    def take(self, trouble: Mapping[NetworkName, str]) -> dict[NetworkName, str]:
        """Take a round in: why each uplink is down (empty: it works).

        Returns those that have changed, with their trouble (empty: it works again).
        """
        changed: dict[NetworkName, str] = {}
        for network, why in trouble.items():
            is_down = network in self.down
            self._streak[network] = 0 if bool(why) == is_down else self._streak[network] + 1
            needed = UPLINK_WORKS_AFTER if is_down else UPLINK_DEAD_AFTER
            if self._streak[network] >= needed:
                self._streak[network] = 0
                changed[network] = why
        for network, why in changed.items():
            if why:
                self.down[network] = why
            else:
                del self.down[network]
        return changed
