"""Run a scenario to its end; replay it with a trace; make a failing one small."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.simulation import invariants
from tests.simulation.actions import do, speak
from tests.simulation.clients import Client
from tests.simulation.packets import be_heard
from tests.simulation.scenario import Scenario
from tests.simulation.streams import small_pieces
from tests.simulation.world import Tell, World, silent

STRAGGLER_PAUSE_S = 1.0
SYNC_TIMEOUT_S = 5.0
PROBING_PAUSES = 5
"""Pauses in which enough rounds of probes pass for all that waits for rounds."""
TALKATIVE = 0.7
MAX_ROUNDS = 8
"""In which clients that speak must have set all right."""


@dataclass(frozen=True)
class Failure:
    """A scenario that ended badly, and how."""

    scenario: Scenario
    reason: str

    @property
    def kind(self) -> str:
        """The reason without names and numbers: what the same fault says in another scenario."""
        return re.sub(r"b'.*?'|\b(ap|lan)?\d[\w.:]*|\b[0-9a-f]{26}\b", "#", self.reason)[:40]


def simulate(scenario: Scenario, tell: Tell = silent) -> None:
    """Carry out the scenario, let all heal, and check what must hold. Raises Violation."""
    with small_pieces():
        _run(World(scenario, tell), scenario, tell)


def _run(world: World, scenario: Scenario, tell: Tell) -> None:
    for step in scenario.steps:
        do(world, step)
    tell("=== everything works again")
    world.heal()
    _settle(world)
    invariants.drained(world)
    world.anchor_again()
    _settle(world)
    invariants.agreement(world)
    tell("=== clients speak, all but some that never will again")
    speaking = [client for client in world.clients if world.random.random() < TALKATIVE]
    for client in speaking:
        if client.at is None:
            client.at = world.random.choice(list(world.nodes))
    _speak_until_quiet(world, speaking)
    invariants.agreement(world)
    invariants.truth(world, speaking)
    tell("=== everybody leaves")
    _leave(world)
    invariants.agreement(world)
    invariants.emptiness(world)


def failure(scenario: Scenario) -> Failure | None:
    """How the scenario fails; None: it doesn't."""
    try:
        simulate(scenario)
    except Exception as fault:  # noqa: BLE001 - whatever the engine raises is a finding
        where = traceback.extract_tb(fault.__traceback__)[-1]
        reason = f"{type(fault).__name__}: {fault} ({where.filename.split('/')[-1]}:{where.lineno})"
        return Failure(scenario, reason)
    return None


def trace(scenario: Scenario) -> list[str]:
    """All that happens, a line each, up to the failure if there is one."""
    lines: list[str] = []
    try:
        simulate(scenario, lines.append)
    except Exception as fault:  # noqa: BLE001
        lines.append(f"*** {type(fault).__name__}: {fault}")
    return lines


def shrink(found: Failure, fails: Callable[[Scenario], Failure | None] = failure) -> Failure:
    """Drop steps for as long as the scenario still fails, larger pieces first."""
    piece = max(1, len(found.scenario.steps) // 2)
    while True:
        start = 0
        dropped = False
        while start < len(found.scenario.steps):
            steps = found.scenario.steps
            smaller = fails(found.scenario.with_steps(steps[:start] + steps[start + piece :]))
            if smaller is None or smaller.kind != found.kind:
                start += piece
            else:
                found, dropped = smaller, True
        if piece == 1 and not dropped:
            return found
        piece = max(1, piece // 2)


def _settle(world: World) -> None:
    """Let time pass, until all that follows from that has happened too."""
    for _ in range(PROBING_PAUSES if world.probing else 2):
        world.rest()
        world.advance(SYNC_TIMEOUT_S)
    world.rest()


def _speak_until_quiet(world: World, clients: Sequence[Client]) -> None:
    for _ in range(MAX_ROUNDS):
        world.advance(STRAGGLER_PAUSE_S)
        for client in clients:
            assert client.at is not None
            world.nodes[client.at].kernel.answer(client)
            be_heard(world.nodes[client.at], client)
            for talk in tuple(client.talks):
                speak(world, client, talk)
        if not world.sweep(world.random):
            return
        world.rest()
    invariants.must(holds=False, otherwise="clients that speak don't get it right")


def _leave(world: World) -> None:
    for client in world.clients:
        client.at = None
        client.talks.clear()
    for node in world.nodes.values():
        for network, table in node.kernel.conntrack.tables.items():
            for key in tuple(table):
                node.kernel.conntrack.close(network, key)
        for network, macs in node.kernel.bridge.fdb.items():
            for mac in tuple(macs):
                node.kernel.bridge.age(network, mac)
    _settle(world)
