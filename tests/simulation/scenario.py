"""What happens in a simulated domain, as plain data: a size and a script of steps.

A step is a word and three numbers, which the world takes modulo what there is: every script can be
carried out, so steps can be dropped from one until no more can be without losing the failure.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple


class Violation(AssertionError):
    """Something that must hold doesn't."""


class Step(NamedTuple):
    """One thing that happens; `actions` says what the numbers mean to each word."""

    action: str
    a: int = 0
    b: int = 0
    c: int = 0

    def __str__(self) -> str:
        return f"{self.action} {self.a} {self.b} {self.c}"


@dataclass(frozen=True)
class Scenario:
    """A domain and what happens in it. `seed` decides whatever order the script leaves open."""

    seed: int
    aps: int
    clients: int
    networks: int
    forwards: int
    capacity: int
    """Changes that each feed remembers."""
    probing: int
    """Whether APs probe each other through the tunnels: an anchor that doesn't answer is dead."""
    takeover: int
    """Whether NAT addresses move between the APs, whose uplinks are on one segment."""
    steps: tuple[Step, ...] = ()

    def __str__(self) -> str:
        size = " ".join(f"{name} {getattr(self, name)}" for name in _SIZES)
        return "\n".join([size, *map(str, self.steps), ""])

    def with_steps(self, steps: tuple[Step, ...]) -> Scenario:
        """The same domain with another script."""
        return replace(self, steps=steps)


_SIZES = ("seed", "aps", "clients", "networks", "forwards", "capacity", "probing", "takeover")


def parse(text: str) -> Scenario:
    """Read what `str` wrote; lines that begin with # are comments. Raises ValueError."""
    lines = [line.split() for line in text.splitlines() if line.strip() and line[0] != "#"]
    first = lines[0]
    size = {name: int(number) for name, number in zip(first[::2], first[1::2], strict=True)}
    if tuple(size) != _SIZES:
        raise ValueError(f"a scenario begins with a line of {', '.join(_SIZES)}")
    steps = tuple(Step(action, *map(int, numbers)) for action, *numbers in lines[1:])
    return Scenario(**size, steps=steps)
