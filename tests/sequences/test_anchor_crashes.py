"""Agents die at every step of a drain, a return and a succession, on paper.

The kernels stay as they are, and with them conntrack's entries and the addresses on the uplinks. A
new agent starts some rounds of probes later. Then every flow is at one AP again: its packets lead
there from everywhere, it has the flow's entry, and it has the address that the replies come to. So
are the address's port forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

import pytest

from apagent.core.domain import Forward
from apagent.core.effects import AdoptFlows, Effect, EndFlows
from apagent.core.events import (
    DrainRequested,
    Event,
    FlowsChanged,
    FlowsListed,
    KernelAdopted,
    PeerDisconnected,
    ReclaimRequested,
)
from apagent.core.model import TCP, ApId, FlowKey, Nat
from tests.anchors_world import World, home
from tests.domains import ANN_IP, AP1, AP2, AP3, LAN, tcp, udp

FLOWS = (tcp(1), tcp(3), udp(2))
WEB = Forward(TCP, 8080, ANN_IP, 80)
FORWARDS = {WEB.outside(home(AP1).address): WEB.inside}
DOWN_ROUNDS = 5
"""For so long nobody is there."""
SETTLED_ROUNDS = 40
DEAD_ROUNDS = 5


class Mortals(World):
    """A world where one agent dies at its n-th step; a step has three ends."""

    def __init__(self) -> None:
        self.conntrack: dict[ApId, dict[FlowKey, Nat]] = {}
        self.asleep: set[ApId] = set()
        self._left = 0
        self._victim = ApId("")
        super().__init__(successor=AP3, forwards={AP1: (WEB,)})

    def kill(self, victim: ApId, end: int) -> None:
        """Let an agent die at so many ends of its steps from now."""
        self._victim, self._left = victim, end

    def restart(self, ap: ApId) -> None:
        """A new agent finds what the kernel holds."""
        self.asleep.discard(ap)
        found = self.installed[ap]
        adopted = KernelAdopted(
            LAN,
            found.flows,
            found.routes,
            found.neighbours,
            frozenset(found.addresses),
            forwards=found.forwards,
        )
        self._start(ap, [FlowsListed({LAN: dict(self.conntrack.get(ap, {}))}), adopted])

    def boot(self, ap: ApId) -> None:
        self.conntrack[ap] = {}
        super().boot(ap)

    def give(self, ap: ApId, event: Event) -> None:
        if isinstance(event, FlowsChanged):
            self._track(ap, event)
        super().give(ap, event)

    def _track(self, ap: ApId, event: FlowsChanged) -> None:
        for key, nat in event.changes.items():
            if nat is None:
                self.conntrack[ap].pop(key, None)
            else:
                self.conntrack[ap][key] = nat

    def _run(self) -> None:
        while self._queue:
            ap, event = self._queue.popleft()
            if ap in self.dead or ap in self.asleep:
                continue
            self._take(ap, event)

    def _take(self, ap: ApId, event: Event) -> None:
        for _ in self._parts(ap, event):
            if ap == self._victim and self._left:
                self._left -= 1
                if not self._left:
                    self.asleep.add(ap)
                    for other in set(self.ids) - {ap}:
                        self._put(other, PeerDisconnected(ap, "killed"))
                    return

    def _parts(self, ap: ApId, event: Event) -> Iterator[None]:
        """A step, and a pause wherever the agent may die."""
        effects = self.engines[ap].step(event, 0.0)
        yield
        self._install(ap)
        yield
        for effect in effects:
            self._carry_out(ap, effect)
            yield

    def _carry_out(self, ap: ApId, effect: Effect) -> None:
        if isinstance(effect, AdoptFlows):
            self.conntrack[ap].update(effect.sessions)
        if isinstance(effect, EndFlows):
            self._track(ap, FlowsChanged(effect.network, dict.fromkeys(effect.flows)))
        super()._carry_out(ap, effect)


def drained(world: Mortals) -> None:
    world.give(AP1, DrainRequested(drain=True))


def returned(world: Mortals) -> None:
    world.give(AP1, DrainRequested(drain=False))
    world.give(AP1, ReclaimRequested())


def dead(world: Mortals) -> None:
    world.power_off(AP1)
    world.rounds(DEAD_ROUNDS)


def unplugged(world: Mortals) -> None:
    world.down[AP1] = "no carrier"
    world.rounds(DEAD_ROUNDS + 2)


Story = Callable[[Mortals], None]


def ends(victim: ApId, flows: tuple[FlowKey, ...], *story: Story) -> Iterator[Mortals]:
    """One world for each end at which the agent may die in the last part of the story."""
    for end in count(1):
        world = Mortals()
        world.open(AP1, *flows)
        for part in story[:-1]:
            part(world)
        world.kill(victim, end)
        story[-1](world)
        if victim not in world.asleep:
            return
        world.rounds(DOWN_ROUNDS)
        world.restart(victim)
        world.rounds(SETTLED_ROUNDS)
        yield world


deaths_of = pytest.mark.parametrize(
    ("victim", "story"),
    [
        *((victim, (drained,)) for victim in (AP1, AP2, AP3)),
        *((victim, (drained, returned)) for victim in (AP1, AP2, AP3)),
        *((victim, (unplugged,)) for victim in (AP1, AP2, AP3)),
        *((victim, (dead,)) for victim in (AP2, AP3)),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(s.__name__ for s in value),
)


@deaths_of
def test_after_a_death_at_any_step_every_flow_is_at_one_ap(
    victim: ApId, story: tuple[Story, ...]
) -> None:
    deaths = 0
    for world in ends(victim, FLOWS, *story):
        deaths += 1
        (owner,) = world.owners(home(AP1))
        for flow in FLOWS:
            alive = [ap for ap in world.ids if ap not in world.dead]
            ways = {ap: world.way(ap, flow) for ap in alive}
            assert set(ways.values()) == {owner}, f"death {deaths}: {ways}, address at {owner}"
            assert flow in world.conntrack[owner], f"death {deaths}: {owner} doesn't know the flow"
    assert deaths > 3


@deaths_of
@pytest.mark.parametrize("flows", [FLOWS, ()], ids=["with flows", "forwards alone"])
def test_after_a_death_at_any_step_forwards_are_at_the_ap_that_has_the_address(
    victim: ApId, story: tuple[Story, ...], flows: tuple[FlowKey, ...]
) -> None:
    for deaths, world in enumerate(ends(victim, flows, *story)):
        (owner,) = world.owners(home(AP1))
        assert world.lead_in() == {owner: FORWARDS}, f"death {deaths}: address at {owner}"
        for ap in world.ids:
            said = {} if ap in world.dead else world.said(ap)
            assert said == (FORWARDS if ap == owner else {}), f"death {deaths}: {ap} says {said}"
