"""Two networks with the same addresses on the same APs: no packet, session or client crosses."""

from __future__ import annotations

import contextlib
import functools

import pytest

from apagent.lab.capture import Capture, touching
from apagent.lab.lab import Lab
from apagent.lab.plan import TWINS
from tests.netns.conftest import MakeLab
from tests.netns.nat_support import accepted, exchange, listening, ping, roam, tcp, udp
from tests.netns.observe import SERVER, address, ask, becomes, eventually, mac, uplink

pytestmark = pytest.mark.netns

STAFF, VISITOR, COLLEAGUE = "client1", "client2", "client3"
PORT = 5555


@pytest.fixture
def domain(lab: MakeLab) -> Lab:
    made = lab(aps=3, clients=3, networks=2, twins=True)
    for client in made.clients:
        roam(made, client, "ap1")
        eventually(functools.partial(_answered, made, client))
    return made


def _answered(lab: Lab, client: str) -> bool:
    return ping(lab, client, SERVER)[0] == 1


def places(lab: Lab, client: str) -> set[tuple[str, str]]:
    """Network and serving AP of a client, as all APs tell them."""
    return {
        (known["network"], known["serving_ap"])
        for ap in lab.aps
        for known in ask(lab, ap, "clients")
        if known["mac"] == mac(lab, client)
    }


def test_the_twins_have_one_address(domain: Lab) -> None:
    assert address(domain, STAFF) == address(domain, VISITOR)
    assert {network.prefix for network in TWINS} == {domain.plan.networks[0].prefix}


def test_the_same_flow_of_two_clients_is_two_flows(domain: Lab) -> None:
    """Same address, same port, same server: both connections live, also when only one roams."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(listening(domain, "server", SERVER))
        ends = []
        for client in (STAFF, VISITOR):
            near = stack.enter_context(
                tcp(domain, client, listener.getsockname(), (address(domain, client), PORT))
            )
            far, (source, _) = accepted(listener)
            ends.append((near, stack.enter_context(far)))
            assert source == uplink("ap1")
        for ap in domain.aps:
            becomes(
                lambda ap=ap: sorted(
                    flow["network"]
                    for flow in ask(domain, ap, "flows", "--protocol", "tcp")
                    if flow["client_port"] == PORT
                ),
                ["guest", "lan"],
            )
        for client, ap in ((STAFF, "ap2"), (VISITOR, "ap3"), (STAFF, "ap3"), (VISITOR, "ap1")):
            roam(domain, client, ap)
            for near, far in ends:
                exchange(near, far)
        assert places(domain, STAFF) == {("lan", "ap3")}
        assert places(domain, VISITOR) == {("guest", "ap1")}


def test_new_flows_and_the_gateway_answer_in_the_right_network(domain: Lab) -> None:
    roam(domain, VISITOR, "ap2")
    guest_air = [domain.plan.antenna(ap, TWINS[1]).name for ap in domain.aps]
    with (
        Capture(domain.namespace("fabric"), guest_air, touching(TWINS[0].prefix)) as guest,
        udp(domain, STAFF) as staff,
        udp(domain, "server", SERVER, 0) as server,
    ):
        staff.sendto(b"hello", server.getsockname())
        server.settimeout(2)
        _, source = server.recvfrom(100)
        assert source[0] == uplink("ap1")
        server.sendto(b"hello", source)
        staff.settimeout(2)
        assert staff.recv(100) == b"hello"
        assert ping(domain, STAFF, str(TWINS[0].gateway), count=2)[0] == 2
        assert guest.count() == 0
    assert ping(domain, VISITOR, str(TWINS[1].gateway), count=2)[0] == 2


def test_a_client_reaches_its_own_colleague(domain: Lab) -> None:
    roam(domain, COLLEAGUE, "ap2")
    assert ping(domain, STAFF, address(domain, COLLEAGUE), count=2)[0] == 2
    assert ping(domain, VISITOR, address(domain, COLLEAGUE), wait_s=0.3)[0] == 0
