"""Whatever netlink refuses in the middle of a batch, the real kernel's state is right after it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from apagent.core.engine import Engine
from apagent.core.events import ClientSeen, FlowsListed, PeerDelta, PeerSnapshot, Source
from apagent.errors import KernelFault
from apagent.kernel.linux import LinuxDataPath
from apagent.kernel.wire import Message, Netlink
from apagent.reconcile import Reconciler
from tests.contract.conftest import AccessPoint, run
from tests.domains import ANN, ANN_IP, AP2, AP3, BEN, BEN_IP, LAN, at, claim, domain, tcp, udp

pytestmark = pytest.mark.netns

DOMAIN = domain()
BEFORE = [tcp(port) for port in range(1, 40)]
AFTER = [tcp(port) for port in range(20, 60)]


class Setting:
    """An engine that knows of a client here and one elsewhere, on a kernel that holds it."""

    def __init__(self) -> None:
        run("nft", "add table inet apagent")  # so that others may change it
        self.path = LinuxDataPath()
        self.path.prepare(DOMAIN)
        self.path.release_hold()
        self.engine = Engine(DOMAIN)
        self.reconciler = Reconciler(self.path, DOMAIN, self.engine)
        table = dict.fromkeys([*BEFORE, udp(5)], at(0))
        self.take(
            FlowsListed({}),
            PeerSnapshot(AP2, 1, {LAN: table}, (claim(AP2, 1, BEN, BEN_IP),)),
            PeerSnapshot(AP3, 1),
            ClientSeen(LAN, ANN, Source.NEIGHBOUR, ANN_IP),
        )

    def take(self, *events: Any) -> None:
        for event in events:
            self.engine.step(event, 0.0)
        self.reconciler.flush()

    def change(self) -> None:
        """The two clients change places, and half of the flows are others."""
        changes = {**dict.fromkeys(BEFORE), **dict.fromkeys(AFTER, at(0)), udp(5): None}
        self.take(
            ClientSeen(LAN, BEN, Source.FDB),
            PeerDelta(AP2, 9, {LAN: changes}, (claim(AP2, 9, ANN, ANN_IP),)),
        )

    def assert_right(self) -> None:
        wanted = self.engine.wanted()
        assert wanted[LAN].flows.keys() == set(AFTER)
        assert self.path.read() == wanted
        assert self.reconciler.fault is None


@pytest.fixture
def setting(access_point: AccessPoint) -> Iterator[Setting]:
    setting = Setting()
    yield setting
    setting.path.close()


def inject(monkeypatch: pytest.MonkeyPatch, netlink: Netlink, method: str, done: int) -> None:
    """Let the next call of a socket's method that has more than `done` messages do only so many."""
    call: Callable[..., None] = getattr(netlink, method)

    def fail(*arguments: Any, **options: Any) -> None:
        *first, last = arguments
        messages: Sequence[Message] = list(last)
        if len(messages) > done:
            monkeypatch.setattr(netlink, method, call)
            call(*first, messages[:done], **options)
            raise KernelFault("injected", errno.ENOBUFS)
        call(*first, messages, **options)

    monkeypatch.setattr(netlink, method, fail)


@pytest.mark.parametrize("done", range(4))
def test_the_rest_of_a_batch_of_routes_and_neighbours_is_lost(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    inject(monkeypatch, setting.path._netlink, "request", done)
    setting.change()
    setting.assert_right()


@pytest.mark.parametrize("before", [True, False], ids=["not done", "done"])
def test_the_answer_to_a_transaction_is_a_fault(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    netlink = setting.path._nft._netlink
    call = netlink.transaction

    def fail(begin: Message, messages: Sequence[Message], end: Message) -> None:
        monkeypatch.setattr(netlink, "transaction", call)
        if not before:
            call(begin, messages, end)
        raise KernelFault("injected", errno.ENOBUFS)

    monkeypatch.setattr(netlink, "transaction", fail)
    setting.change()
    setting.assert_right()
    assert setting.reconciler.repairs == before


DAMAGE = {
    "an element that goes": "nft flush map inet apagent lan_flows",
    "an element that comes": "nft add element inet apagent lan_flows "
    "{ 10.77.1.1 . 198.51.100.10 . 6 . 50 . 80 : 6170:2 }",
    "a set": "nft flush set inet apagent lan_known",
    "the table": "nft delete table inet apagent",
    "a neighbour": f"ip neigh del {ANN_IP} dev br-lan",
    "a route": f"ip route del {BEN_IP} table 77000",
    "the tunnel device": "ip link del apv-lan",
    "the tunnel device down": "ip link set apv-lan down",
    "the bridge": "ip link set br-lan down",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_others_were_there_just_before_a_change(setting: Setting, damage: str) -> None:
    """No event is read: the change itself runs into what they did, or leaves it to the check."""
    run("sh", "-c", damage)
    setting.change()
    setting.reconciler.check(session_maps=False)
    setting.assert_right()


def test_a_refused_batch_in_the_middle_of_many(setting: Setting) -> None:
    """More changes than a transaction holds, and one element in the way of the third."""
    many = {tcp(port): at(0) for port in range(1000, 14000)}
    element = "10.77.1.1 . 198.51.100.10 . 6 . 10000 . 80 : 6170:2"
    run("nft", f"add element inet apagent lan_flows {{ {element} }}")
    setting.take(PeerDelta(AP2, 2, {LAN: many}))
    assert setting.path.read() == setting.engine.wanted()
    assert setting.reconciler.fault is None
