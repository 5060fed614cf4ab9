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

MOVED_S, MOVED_FLOW_S = 1.0, 50e-6
"""How long flows are still translated here after all agents know that their NAT address has moved
to another AP, and how much longer for each flow. Packets come until all kernels know, too, and
without its entry a flow would be reset."""
MOVED_ROUNDS = 60
"""How often they are asked for, each `MOVED_S`: an agent may be down while its kernel is alive."""
AGAIN_S = 1.0
"""When the kernel is asked again for what it has refused."""
ATTEMPTS = 60
"""How often it is asked in all."""
ENDED_A_TURN = 2048
"""Flows that are ended in one turn of the loop, some milliseconds' work: their ends are reported,
and more at once would overflow the socket."""


class _Refused(NamedTuple):
    """A flow that the kernel didn't end."""

    nat: Nat | None
    """What was known of it, if anything."""
    attempts: int
    """How many there have been."""


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
        self._refused: dict[EndFlows, dict[FlowKey, _Refused]] = {}
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
            self._later(MOVED_S, partial(self._end_moved, kind, moved, rounds - 1))
        elif moved and not all_know:
            delay_s = MOVED_S + MOVED_FLOW_S * len(moved)
            self._later(delay_s, partial(self._end_moved, kind, moved, rounds, all_know=True))
        else:
            self._end(kind, moved)

    def _end(
        self,
        kind: EndFlows,
        flows: Collection[FlowKey],
        before: Mapping[FlowKey, _Refused] = MappingProxyType({}),
    ) -> None:
        """End `flows`; what is refused is kept, with what is known of it from `before`."""
        if not flows:
            return
        own = self._engine.sessions[kind.network].table(self._engine.me)
        flows, rest = sorted(flows)[:ENDED_A_TURN], sorted(flows)[ENDED_A_TURN:]
        if rest:
            known = {key: before[key].nat if key in before else own.get(key) for key in rest}
            self._later(0.0, partial(self._end_rest, kind, known, before))
        try:
            self._flows.end(kind.network, flows)
        except KernelFault as fault:
            if not before:
                log.warning("%s; trying again", fault)
            if not self._refused:
                self._later(AGAIN_S, self._again)
            refused = self._refused.setdefault(kind, {})
            for key in flows:
                nat, attempts = before.get(key, _Refused(own.get(key), 0))
                refused[key] = _Refused(nat, attempts + 1)

    def _end_rest(
        self,
        kind: EndFlows,
        known: Mapping[FlowKey, Nat | None],
        before: Mapping[FlowKey, _Refused],
    ) -> None:
        # Of what wasn't known, conntrack may not have reported yet that it is there.
        unknown = {key for key, nat in known.items() if nat is None}
        self._end(kind, self._engine.still_to_end(kind, known) | unknown, before)

    def _again(self) -> None:
        """Ask again for what is still to end."""
        refused, self._refused = self._refused, {}
        for kind, flows in refused.items():
            still = self._engine.still_to_end(kind, {key: it.nat for key, it in flows.items()})
            spent = {key for key in still if flows[key].attempts >= ATTEMPTS}
            if spent:
                log.error("%d flows go on here that should end: the kernel refuses", len(spent))
            self._end(kind, still - spent, flows)
