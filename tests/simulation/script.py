"""Scenarios drawn from a seed.

Each seed has faults of its own: some kinds are frequent, some rare, some never happen. So the seeds
together also try the combinations in which one kind of fault would hide another.
"""

from __future__ import annotations

from random import Random

from tests.simulation.scenario import Scenario, Step

_WIDE = 1 << 16
"""Numbers that the world takes modulo what there is."""

TRAFFIC = {"open": 6, "say": 8, "close": 2, "expire": 2, "answer": 1, "call": 2, "arp": 2}
ROAMS = {"roam": 8, "leave": 1, "repeat": 1, "age": 1}
FAULTS = {
    "readdress": 1,
    "late": 2,
    "clock": 1,
    "stall": 3,
    "snap": 3,
    "cut": 2,
    "isolate": 1,
    "tunnel": 2,
    "lose": 2,
    "kill": 1,
    "crash": 1,
    "start": 2,
    "restart": 2,
    "reboot": 1,
    "timeout": 1,
}
ANCHOR_FAULTS = {"uplink": 2, "drain": 2, "reclaim": 1}
MAX_PROBING = 6
"""APs in a domain whose APs probe each other: each tells each how it is, ten times a second."""
FREQUENCIES = (0.0, 0.0, 0.3, 1.0, 3.0)
PAUSES_MS = (0, 0, 1, 30, 200, 6000)
SHARES = (10, 30, 60, 100)


def draw(seed: int, aps: int | None = None) -> Scenario:
    """The scenario of a seed, with so many APs if that is given."""
    random = Random(seed)
    size = random.choice((3, 3, 3, 4, 4, 5, 6))
    clients = random.randint(1, 5)
    scenario = Scenario(
        seed=seed,
        aps=aps or size,
        clients=clients,
        networks=random.choice((1, 1, 2)),
        forwards=random.choice((0, 0, 1, 3)),
        capacity=random.choice((6, 20, 200, 65536)),
        probing=(probing := int((aps or 0) <= MAX_PROBING and random.random() < 0.6)),
        takeover=probing * random.choice((0, 1, 1)),
    )
    weights: dict[str, float] = {**TRAFFIC, **ROAMS}
    faults = FAULTS | ANCHOR_FAULTS if probing else FAULTS
    weights.update({name: w * random.choice(FREQUENCIES) for name, w in faults.items()})
    busy = random.choice((0.2, 0.5, 0.8))
    """How often something happens before what is under way has moved."""
    steps: list[Step] = []
    for _ in range(random.choice((30, 80, 200))):
        (name,) = random.choices(list(weights), list(weights.values()))
        steps.append(Step(name, *(random.randrange(_WIDE) for _ in range(3))))
        if random.random() > busy:
            steps.append(_run(random))
    return scenario.with_steps(tuple(steps))


def _run(random: Random) -> Step:
    share, pause = random.choice(SHARES), random.choice(PAUSES_MS)
    return Step("run", share, random.randrange(_WIDE), pause)
