"""The contract of a `TunnelProber`, kept by the fake and by two real kernels with a tunnel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from typing import Protocol

import pytest

from apagent.core.domain import Domain
from apagent.core.liveness import ALIVE_AFTER
from apagent.core.model import ApId
from apagent.errors import KernelFault
from apagent.kernel.linux import LinuxDataPath
from apagent.kernel.port import TunnelProber
from apagent.kernel.probes import PROMPT_PROBES, LinuxTunnelProber
from tests.contract import packets
from tests.contract.conftest import run
from tests.contract.flow_support import inside, namespace, run_inside
from tests.contract.packets import eventually
from tests.domains import AP2, AP3, domain, lan
from tests.fakes.kernel import FakeTunnelProber

TWO_NETWORKS = (lan("zoo", "10.78.0.0/16", 78), lan())

_PEER = """
link set lo up
link add br-lan type bridge
link add br-zoo type bridge
link add wan type bridge
link set wan up
address add 203.0.113.12/24 dev wan
route add default via 203.0.113.1
link set others name underlay
link set underlay up
address add 10.99.0.2/24 dev underlay
"""


class World(Protocol):
    """We are ap1; ap2 is alive, or not; ap3 never was."""

    @property
    def prober(self) -> TunnelProber: ...

    def kill(self) -> None:
        """ap2 loses its power."""

    def revive(self) -> None:
        """It has it again."""

    def lose_device(self) -> None:
        """Our tunnel device is removed."""

    def make_device(self) -> None:
        """It is made anew."""


class Fake:
    def __init__(self) -> None:
        self.prober = FakeTunnelProber()
        self.revive()

    def kill(self) -> None:
        self.prober.alive.clear()

    def revive(self) -> None:
        self.prober.alive.add(AP2)

    def lose_device(self) -> None:
        self.prober.device_is_gone = True

    def make_device(self) -> None:
        self.prober.device_is_gone = False


class Real:
    """No agent runs, here or there."""

    def __init__(self, stack: ExitStack) -> None:
        self._peer = namespace(stack)
        run("ip", "link", "set", "others", "netns", str(self._peer))
        run_inside(self._peer, "ip", "-batch", "-", stdin=_PEER)
        run_inside(self._peer, "sysctl", "-qw", "net.ipv4.conf.all.rp_filter=1")
        run("ip", "route", "add", "default", "via", "203.0.113.1")
        # The order of the networks is each AP's own.
        self._domain = domain(networks=TWO_NETWORKS)
        there = domain(AP2, networks=TWO_NETWORKS[::-1])
        self._path = prepared(self._domain)
        stack.callback(self._path.close)
        stack.callback(inside(self._peer, partial(prepared, there)).close)
        self.prober = LinuxTunnelProber(self._domain)

    def kill(self) -> None:
        run_inside(self._peer, "ip", "link", "set", "underlay", "down")

    def revive(self) -> None:
        run_inside(self._peer, "ip", "link", "set", "underlay", "up")

    def lose_device(self) -> None:
        run("ip", "link", "del", "apv-zoo")

    def make_device(self) -> None:
        self._path.prepare(self._domain)


def prepared(domain_: Domain) -> LinuxDataPath:
    path = LinuxDataPath()
    path.prepare(domain_)
    return path


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.netns)])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    with ExitStack() as stack:
        if request.param == "real":
            request.getfixturevalue("access_point")
            made: World = Real(stack)
        else:
            made = Fake()
        with closing(made.prober):
            yield made


def alive(prober: TunnelProber) -> Callable[[], bool]:
    """Whether ap2 answers when it is probed again."""

    def answers() -> bool:
        prober.probe([AP2, AP3])
        return answered(prober) == {AP2}

    return answers


def answered(prober: TunnelProber) -> frozenset[ApId]:
    """What has come within some time: an answer comes from the same machine."""
    found: set[ApId] = set()

    def heard() -> bool:
        found.update(prober.answered())
        return bool(found)

    eventually(heard, patience_s=0.5)
    return frozenset(found)


def test_nobody_answers_who_was_not_asked(world: World) -> None:
    assert answered(world.prober) == frozenset()
    world.prober.probe([])
    world.prober.probe([AP3])
    assert answered(world.prober) == frozenset()


def test_who_is_alive_answers_once(world: World) -> None:
    world.prober.probe([AP3, AP2])
    assert answered(world.prober) == {AP2}
    assert answered(world.prober) == frozenset()


def test_who_is_dead_does_not_answer_until_it_is_back(world: World) -> None:
    world.kill()
    world.prober.probe([AP2, AP3])
    assert answered(world.prober) == frozenset()
    world.revive()
    assert eventually(alive(world.prober))


def test_who_is_spared_and_well_is_asked_every_second_round_until_it_owes_an_answer(
    world: World,
) -> None:
    def round_() -> bool:
        """Whether ap2 has answered in it."""
        world.prober.probe([AP2, AP3], spared)
        return answered(world.prober) == {AP2}

    spared = [AP2, AP3]
    assert all(round_() for _ in range(PROMPT_PROBES))
    assert [round_() for _ in range(6)] in ([True, False] * 3, [False, True] * 3)
    spared.remove(AP2)
    assert all(round_() for _ in range(6))
    spared.append(AP2)
    world.kill()
    assert not any(round_() for _ in range(3))
    world.revive()
    assert eventually(round_)
    assert all(round_() for _ in range(ALIVE_AFTER))


def test_without_a_device_nobody_can_be_asked(world: World) -> None:
    world.lose_device()
    with pytest.raises(KernelFault):
        world.prober.probe([AP2, AP3])
    assert answered(world.prober) == frozenset()
    world.make_device()
    assert eventually(alive(world.prober))


@pytest.mark.netns
@pytest.mark.usefixtures("access_point")
def test_an_answer_counts_for_some_rounds() -> None:
    with ExitStack() as stack:
        stack.enter_context(closing(prepared(domain())))
        prober = stack.enter_context(closing(LinuxTunnelProber(domain())))
        tunnel = stack.enter_context(packets.wire("apv-lan", outgoing=True))
        prober.probe([AP2])
        request = packets.Packet.of(tunnel.frame()[14:])

        def answer(late_rounds: int, *, foreign: bool = False) -> frozenset[ApId]:
            for _ in range(late_rounds):
                prober.probe([])
            body = bytearray(request.body)
            body[0] = 0
            body[4] ^= foreign
            body[2:4] = bytes(2)
            body[2:4] = packets.checksum(bytes(body)).to_bytes(2, "big")
            me, peer = domain().me, domain().peers[0]
            reply = packets.Packet(peer.tunnel_address, me.tunnel_address, 1, bytes(body))
            inner = packets.frame(peer.tunnel_mac, me.tunnel_mac, reply)
            outer = packets.vxlan(77, peer.underlay, me.underlay, inner)
            with packets.wire("others") as wire:
                to = packets.mac_of("underlay")
                wire.send(packets.frame(packets.mac_of("others"), to, outer))
            return answered(prober)

        assert answer(0, foreign=True) == frozenset()
        assert answer(0) == {AP2}
        assert answer(9) == {AP2}
        assert answer(1) == frozenset()


@pytest.mark.netns
@pytest.mark.usefixtures("access_point")
def test_a_peer_that_cannot_be_sent_to_does_not_keep_the_others() -> None:
    """Here by a firewall of the AP's own."""
    run("nft", "add table ip f; add chain ip f o { type filter hook output priority 0; }")
    run("nft", "add rule ip f o ip daddr 100.127.0.2 drop")
    with ExitStack() as stack:
        stack.enter_context(closing(prepared(domain())))
        prober = stack.enter_context(closing(LinuxTunnelProber(domain())))
        tunnel = stack.enter_context(packets.wire("apv-lan", outgoing=True))
        prober.probe([AP2, AP3])
        assert (
            packets.Packet.of(tunnel.frame()[14:]).destination == domain().peers[1].tunnel_address
        )


@pytest.mark.netns
@pytest.mark.usefixtures("access_point")
def test_by_a_device_that_is_down_nobody_can_be_asked() -> None:
    """Else all peers would seem to have died at once."""
    with closing(prepared(domain())), closing(LinuxTunnelProber(domain())) as prober:
        run("ip", "link", "set", "apv-lan", "down")
        with pytest.raises(KernelFault, match="probes by apv-lan"):
            prober.probe([AP2, AP3])
        prober.probe([])


@pytest.mark.netns
@pytest.mark.usefixtures("access_point")
def test_before_the_data_path_is_prepared_there_is_no_prober() -> None:
    with pytest.raises(KernelFault, match="probes by apv-lan"):
        LinuxTunnelProber(domain())
