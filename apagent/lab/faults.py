"""What can go wrong in a lab: power, cables, and networks that let only some packets pass.

Everything is done from outside of the APs, as it would happen to real ones: at the far ends of
their cables, and in the bridges between them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from enum import StrEnum

from apagent.lab import build, rtnl
from apagent.lab.lab import Lab
from apagent.lab.plan import FABRIC, INTERNET
from apagent.lab.programs import path

_TABLE = "apagent_lab_faults"


class Way(StrEnum):
    """What is cut between two APs."""

    CONTROL = "ip protocol tcp"
    """What the agents say to each other."""
    SUBSCRIPTION = "tcp dport 7411"
    """What an agent says to those whose feeds it follows; they hear from it by its own feed."""
    TUNNEL = "ip protocol udp"
    """Their clients' packets."""
    BACKHAUL = "meta protocol ip"
    """Both."""


class Faults:
    """Breaks a lab and mends it again."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._cut: set[tuple[str, str, Way]] = set()
        self._off: set[str] = set()
        self._blocked: set[str] = set()

    @property
    def off(self) -> frozenset[str]:
        """The APs without power."""
        return frozenset(self._off)

    # --- power

    def power_off(self, ap: str) -> int:
        """An AP loses its power: agent, cables and radio are gone in the same moment.

        Returns that moment (CLOCK_MONOTONIC, ns).
        """
        self._off.add(ap)
        died_ns = time.monotonic_ns()
        self._plug([*self._cables(ap), *self._antennas(ap)], up=False)
        if self._lab.agents.process(ap) is not None:
            self._lab.kill_agent(ap)
        self._forget(ap)
        return died_ns

    def power_on(self, ap: str) -> None:
        """It boots: its kernel knows nothing of what was; its agent starts, and then its radio."""
        self.boot(ap)
        self._lab.agents.wait_ready([ap])
        self.radio_on(ap)

    def boot(self, ap: str) -> None:
        """The first part of it: cables and agent, which may still be starting when this returns."""
        self._off.discard(ap)
        self._plug([*self._cables(ap)], up=True)
        self._lab.agents.prepare(ap)
        self._lab.agents.start(ap)

    def radio_on(self, ap: str) -> None:
        """The last part: hostapd starts."""
        self._plug([*self._antennas(ap)], up=True)

    # --- cables

    def unplug_uplink(self, ap: str) -> None:
        """Pull the cable of an AP's uplink."""
        self._plug([(INTERNET, ap)], up=False)

    def plug_uplink(self, ap: str) -> None:
        """Plug it in again."""
        self._plug([(INTERNET, ap)], up=True)

    def block_uplink(self, ap: str) -> None:
        """Let nothing pass between an AP's uplink and its segment; the carrier stays."""
        self._blocked.add(ap)
        self._block()

    def unblock_uplink(self, ap: str) -> None:
        """Let everything pass again."""
        self._blocked.discard(ap)
        self._block()

    def unplug_backhaul(self, ap: str) -> None:
        """Pull the cable between an AP and the others."""
        self._plug([(FABRIC, self._backhaul(ap))], up=False)

    def plug_backhaul(self, ap: str) -> None:
        """Plug it in again."""
        self._plug([(FABRIC, self._backhaul(ap))], up=True)

    # --- networks

    def cut(self, sender: str, receiver: str, way: Way) -> None:
        """Let nothing of a kind pass from one AP to another; the other direction is left."""
        self._cut.add((sender, receiver, way))
        self._filter()

    def part(self, one: str, two: str, way: Way) -> None:
        """Cut both directions between two APs."""
        self._cut |= {(one, two, way), (two, one, way)}
        self._filter()

    def isolate(self, ap: str, way: Way) -> None:
        """Cut an AP off from all others, in both directions."""
        for other in self._lab.aps:
            if other != ap:
                self._cut |= {(ap, other, way), (other, ap, way)}
        self._filter()

    def cut_exactly(self, cuts: Iterable[tuple[str, str, Way]]) -> None:
        """Cut these, from sender to receiver, and let everything else pass."""
        self._cut = set(cuts)
        self._filter()

    def heal(self) -> None:
        """Let everything pass again."""
        self._cut.clear()
        self._filter()

    # --- how

    def _filter(self) -> None:
        drops = [
            f'iifname "{self._backhaul(sender)}" oifname "{self._backhaul(receiver)}" {way} drop'
            for sender, receiver, way in sorted(self._cut)
        ]
        self._lab.run(FABRIC, ["nft", _replacing([_chain("forward", drops)])])

    def _block(self) -> None:
        drops = [f'{side}ifname "{ap}" drop' for ap in sorted(self._blocked) for side in "io"]
        chains = [
            _chain(hook, [rule for rule in drops if hook == "forward" or rule[0] == hook[0]])
            for hook in ("input", "output", "forward")
        ]
        self._lab.run(INTERNET, ["nft", _replacing(chains)])

    def _backhaul(self, ap: str) -> str:
        return "bh" + ap.removeprefix("ap")

    def _cables(self, ap: str) -> Iterable[tuple[str, str]]:
        yield INTERNET, ap
        yield FABRIC, self._backhaul(ap)

    def _antennas(self, ap: str) -> Iterable[tuple[str, str]]:
        for network in self._lab.plan.networks:
            yield FABRIC, self._lab.plan.antenna(ap, network).name

    def _plug(self, ends: Iterable[tuple[str, str]], *, up: bool) -> None:
        for node, name in ends:
            end = self._lab.plan.interface(node, name)
            with build.route_socket(self._lab.place, node) as netlink:
                what = f"{'plugging' if up else 'unplugging'} {name} of {node}"
                netlink.request([rtnl.set_up(end.index, what, up=up)])

    def _forget(self, ap: str) -> None:
        """What a kernel loses with its power."""
        self._lab.agents.prepare(ap)
        config = str(self._lab.agents.config_file(ap))
        self._lab.run(ap, [path("apagent"), "cleanup", "--config", config])
        self._lab.run(ap, ["conntrack", "-F"], check=False)
        self._lab.run(ap, ["ip", "neigh", "flush", "all"], check=False)
        for network in self._lab.plan.networks:
            # What is permanent is the bridge's own address: without it, it takes nothing in.
            learned = ["dev", network.client_interface, "nopermanent"]
            self._lab.run(ap, ["bridge", "fdb", "flush", *learned], check=False)


def _chain(hook: str, rules: Iterable[str]) -> str:
    """A chain of a bridge, as text for nft."""
    body = "; ".join([f"type filter hook {hook} priority 0", *rules])
    return f"chain {hook} {{ {body}; }};"


def _replacing(chains: Iterable[str]) -> str:
    """Text for nft that replaces our table by one of these chains."""
    table = f"table bridge {_TABLE}"
    return f"{table}; delete {table}; {table} {{ {' '.join(chains)} }}"
