"""Ends flows of ours in the kernel: when nobody sends us their packets, and until it is done.

The engine says once that a flow is to end. If the kernel refuses, it is asked again every second,
for what the engine still wants to end by then: another anchor may have let go of the flow, our
uplink may be back, or a new client may have opened a flow of its own that looks the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

from apagent.core.effects import EndFlows
from apagent.core.engine import Engine
from apagent.core.model import FlowKey, Nat
from apagent.errors import KernelFault
from apagent.kernel.port import FlowMonitor

log = logging.getLogger(__name__)

MOVED_S, MOVED_FLOW_S = 5.0, 50e-6
"""How long flows are still translated here after all agents that we hear know that their NAT
address has moved to another AP, and how much longer for each flow. Packets come until all kernels
know, too, and without its entry a flow would be reset. That an agent is stuck is noticed by then
(`peers.keepalive`)."""
MOVED_ROUNDS = 60
"""How often it is asked whether they know, each `AGAIN_S`: an agent may be down while its kernel is
alive."""
AGAIN_S = 1.0
"""When the kernel is asked again for what it has refused."""
ATTEMPTS = 60
"""How often it is asked in all."""
ENDED_A_TURN = 2048
"""Flows that are ended in one turn of the loop, some milliseconds' work: their ends are reported,
and more at once would overflow the socket."""


class _Due(NamedTuple):
    """A flow that is to end."""

    nat: Nat | None
    """What was known of it, if anything."""
    attempts: int = 0
    """How often the kernel has refused to end it."""


class FlowEnds:
    """Carries out `EndFlows`."""

    def __init__(
        self,
        engine: Engine,
        flows: FlowMonitor,
        later: Callable[[float, Callable[[], None]], object],
    ) -> None:
        """`later` calls something after a number of seconds."""
        self._engine = engine
        self._flows = flows
        self._later = later
        self._refused: dict[EndFlows, dict[FlowKey, _Due]] = {}
        """By what was to be done, without the flows."""

    def carry_out(self, ending: EndFlows) -> None:
        """End the flows; those whose NAT address has moved a little later."""
        kind = EndFlows(ending.network, (), ending.why, ending.owner)
        moved = self._engine.moved_away(ending.network, ending.flows)
        self._end(kind, set(ending.flows) - moved)
        self._end_moved(kind, moved)

    def _end_moved(
        self,
        kind: EndFlows,
        flows: Collection[FlowKey],
        rounds: int = MOVED_ROUNDS,
        *,
        all_know: bool = False,
    ) -> None:
        """End those that have not come back in the meantime, when nobody sends us their packets."""
        moved = self._engine.moved_away(kind.network, flows)
        if moved and rounds and self._engine.anchoring.is_moving(kind.network):
            self._later(AGAIN_S, partial(self._end_moved, kind, moved, rounds - 1))
        elif moved and not all_know:
            delay_s = MOVED_S + MOVED_FLOW_S * len(moved)
            self._later(delay_s, partial(self._end_moved, kind, moved, rounds, all_know=True))
        else:
            self._end(kind, moved)

    def _end(
        self,
        kind: EndFlows,
        flows: Collection[FlowKey],
        before: Mapping[FlowKey, _Due] = MappingProxyType({}),
    ) -> None:
        """End `flows`; `before` are those of them that the kernel has refused to end."""
        own = self._engine.sessions[kind.network].table(self._engine.me)
        due = [(key, before.get(key) or _Due(own.get(key))) for key in sorted(flows)]
        self._end_some(kind, dict(due[:ENDED_A_TURN]), due[ENDED_A_TURN:])

    def _end_some(
        self, kind: EndFlows, flows: Mapping[FlowKey, _Due], rest: list[tuple[FlowKey, _Due]]
    ) -> None:
        """End `flows` now, and those of the rest in the next turns that are still to end then."""
        if rest:
            self._later(0.0, partial(self._end_rest, kind, rest))
        if not flows:
            return
        try:
            self._flows.end(kind.network, flows)
        except KernelFault as fault:
            if not all(due.attempts for due in flows.values()):
                log.warning("%s; trying again", fault)
            if not self._refused:
                self._later(AGAIN_S, self._again)
            refused = self._refused.setdefault(kind, {})
            refused.update((key, _Due(nat, n + 1)) for key, (nat, n) in flows.items())

    def _end_rest(self, kind: EndFlows, rest: list[tuple[FlowKey, _Due]]) -> None:
        flows, rest = dict(rest[:ENDED_A_TURN]), rest[ENDED_A_TURN:]
        still = self._still_to_end(kind, flows)
        # Of what wasn't known, conntrack may not have reported yet that it is there.
        some = {key: due for key, due in flows.items() if due.nat is None or key in still}
        self._end_some(kind, some, rest)

    def _still_to_end(self, kind: EndFlows, flows: Mapping[FlowKey, _Due]) -> set[FlowKey]:
        return self._engine.still_to_end(kind, {key: due.nat for key, due in flows.items()})

    def _again(self) -> None:
        """Ask again for what is still to end."""
        refused, self._refused = self._refused, {}
        for kind, flows in refused.items():
            still = self._still_to_end(kind, flows)
            spent = {key for key in still if flows[key].attempts >= ATTEMPTS}
            if spent:
                log.error("%d flows go on here that should end: the kernel refuses", len(spent))
            self._end(kind, still - spent, flows)
