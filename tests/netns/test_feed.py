"""The feed between agents that restart, lose each other, or speak different versions.

Whether all APs hold the same tables is told by their checksums, as an operator would see it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from apagent.lab import namespaces
from apagent.lab.faults import Faults, Way
from apagent.lab.lab import Lab
from apagent.lab.traffic.running import running, serving
from tests.netns.conftest import MakeLab
from tests.netns.observe import SERVER, agreed, ask, becomes, eventually, served_by
from tests.netns.sockets import connection, udp_socket

pytestmark = pytest.mark.netns

FLOWS = 5000
FIRST_PORT = 20_000
CHANGED = 20
FEW = 300
"""Sessions that may travel for those that changed: each brings those of its bucket along."""
SPREAD_S = 20.0
_UDP_TIMEOUT_S = 300
_MANY = 20

VERSION_1 = """
import sys
from apagent.peers import versions
versions.HIGHEST = 1
from apagent.cli.agent import main
sys.exit(main(sys.argv[1:]))
"""
"""An agent that knows nothing of what came after version 1 of the feed."""


def same_everywhere(lab: Lab) -> dict[str, str]:
    """Wait until all agents are in sync and hold the same tables; the checksum of each AP's."""

    def alike() -> dict[str, str] | None:
        found = {ap: {str(ask(lab, ap, "status")["checksum"])} for ap in lab.aps}
        peers = [peer for ap in lab.aps for peer in ask(lab, ap, "peers")]
        for peer in peers:
            found[peer["id"]].add(peer["checksum"])
        in_sync = all(peer["state"] == "in-sync" for peer in peers)
        if not in_sync or any(len(of_one) > 1 for of_one in found.values()):
            return None
        return {ap: next(iter(of_one)) for ap, of_one in found.items()}

    return eventually(alike, SPREAD_S)


def feed(lab: Lab, ap: str, peer: str) -> dict[str, Any]:
    """How the feed of `peer` goes at `ap`."""
    return next(found for found in ask(lab, ap, "peers") if found["id"] == peer)


def states(lab: Lab, ap: str, peer: str) -> list[str]:
    """The feed between two APs, as each of them sees the other's."""
    return [feed(lab, ap, peer)["state"], feed(lab, peer, ap)["state"]]


def keep_udp(lab: Lab) -> None:
    """Let UDP flows outlive the test."""
    for ap in lab.aps:
        with namespaces.inside(lab.namespace(ap)):
            for name in ("udp_timeout", "udp_timeout_stream"):
                namespaces.set_sysctl(f"netfilter/nf_conntrack_{name}", _UDP_TIMEOUT_S)


def test_after_traffic_roams_a_partition_and_a_restart_all_hold_the_same(lab: MakeLab) -> None:
    domain = lab(aps=3, clients=2)
    faults = Faults(domain)
    keep_udp(domain)
    with (
        serving(domain),
        running(domain, "client1", "echo", SERVER, "--rate", 100),
        connection(domain, "client2"),
        udp_socket(domain, "client1") as udp,
    ):
        for port in range(FIRST_PORT, FIRST_PORT + _MANY):
            udp.sendto(b"hello", (SERVER, port))
        eventually(lambda: int(ask(domain, "ap1", "status")["own_sessions"]) >= _MANY)
        first = same_everywhere(domain)
        for ap in ("ap2", "ap3", "ap1"):
            domain.roam("client1", ap)
            served_by(domain, "client1", ap)
            with udp_socket(domain, "client1") as another:
                another.sendto(b"hello", (SERVER, FIRST_PORT))
            eventually(lambda ap=ap: ask(domain, ap, "status")["checksum"] != first[ap])
        second = same_everywhere(domain)

        faults.isolate("ap1", Way.CONTROL)
        domain.roam("client2", "ap1")
        domain.roam("client1", "ap2")
        with udp_socket(domain, "client1") as another:
            another.sendto(b"hello", (SERVER, FIRST_PORT))
        becomes(lambda: states(domain, "ap1", "ap2"), ["lost", "lost"], SPREAD_S)
        faults.heal()
        third = same_everywhere(domain)
        assert third["ap2"] != second["ap2"]

        domain.kill_agent("ap1")
        domain.start_agent("ap1")
        fourth = same_everywhere(domain)
        served_by(domain, "client2", "ap1")
        assert fourth["ap2"] == third["ap2"]
        # A restarted agent no longer knows under which claims its flows were opened.
        assert fourth["ap1"] != third["ap1"]
        agreed(domain)


def test_while_an_agent_is_down_roams_go_on_and_then_only_the_difference_travels(
    lab: MakeLab, record_property: Callable[[str, object], None]
) -> None:
    domain = lab(aps=3, clients=2)
    keep_udp(domain)
    with connection(domain, "client1") as talk, udp_socket(domain, "client1") as udp:
        for port in range(FIRST_PORT, FIRST_PORT + FLOWS):
            udp.sendto(b"hello", (SERVER, port))
        eventually(lambda: int(ask(domain, "ap1", "status")["own_sessions"]) > FLOWS, SPREAD_S)
        domain.roam("client1", "ap2")
        served_by(domain, "client1", "ap2")
        same_everywhere(domain)
        known = feed(domain, "ap2", "ap1")
        assert known["changes_received"] >= FLOWS

        domain.kill_agent("ap1")
        becomes(lambda: feed(domain, "ap2", "ap1")["state"], "lost")
        assert feed(domain, "ap2", "ap1")["sessions"] == known["sessions"]
        for port in range(FIRST_PORT, FIRST_PORT + CHANGED // 2):
            argv = ["conntrack", "-D", "-p", "udp", "--orig-port-dst", str(port)]
            domain.run("ap1", argv)
            udp.sendto(b"hello", (SERVER, port + FLOWS))  # of a socket that ap1 anchors
        # The anchor still sends its packets to ap2, where they follow the client.
        domain.roam("client1", "ap3")
        becomes(lambda: ask(domain, "ap2", "client", "show", "10.77.1.1")["serving_ap"], "ap3")
        talk.exchange(b"still here\n")

        domain.start_agent("ap1")
        becomes(lambda: feed(domain, "ap2", "ap1")["state"], "in-sync", SPREAD_S)
        same_everywhere(domain)
        again = {ap: feed(domain, ap, "ap1") for ap in ("ap2", "ap3")}
        travelled = again["ap2"]["changes_received"] - known["changes_received"]
        record_property("sessions_that_travelled", travelled)
        assert CHANGED <= travelled < FEW
        for peer in again.values():
            assert (peer["snapshots"], peer["differences"]) == (1, 1)
        talk.exchange(b"and again\n")


@pytest.mark.parametrize(
    ("way", "broken"),
    [(Way.CONTROL, ["lost", "lost"]), (Way.SUBSCRIPTION, ["lost", "in-sync"])],
    ids=["all of TCP", "to the port"],
)
def test_a_partition_in_one_direction_is_told_as_it_is_and_heals(
    lab: MakeLab, way: Way, broken: list[str], record_property: Callable[[str, object], None]
) -> None:
    domain = lab(aps=3, clients=2)
    faults = Faults(domain)
    with connection(domain, "client1") as talk, connection(domain, "client2"):
        domain.roam("client1", "ap2")
        served_by(domain, "client1", "ap2")
        same_everywhere(domain)
        faults.cut("ap2", "ap1", way)
        began = time.monotonic()
        becomes(lambda: states(domain, "ap2", "ap1"), broken, SPREAD_S)
        record_property("noticed_after_s", round(time.monotonic() - began, 1))
        held = feed(domain, "ap2", "ap1")
        assert held["sessions"] >= 1
        assert held["reason"]
        assert states(domain, "ap2", "ap3") == ["in-sync", "in-sync"]
        talk.exchange(b"through the tunnel\n")
        with connection(domain, "client1"), connection(domain, "client2"):
            becomes(lambda: feed(domain, "ap3", "ap2")["sessions"], 3)
            faults.heal()
            began = time.monotonic()
            becomes(lambda: states(domain, "ap2", "ap1"), ["in-sync", "in-sync"], SPREAD_S)
            record_property("healed_after_s", round(time.monotonic() - began, 1))
            same_everywhere(domain)
            agreed(domain)
    whole = [feed(domain, *pair)["snapshots"] for pair in (("ap1", "ap2"), ("ap2", "ap1"))]
    assert whole == [1, 1]


def test_agents_of_version_1_and_2_make_one_domain(lab: MakeLab) -> None:
    domain = lab(aps=3, clients=1, agents=True)
    domain.agents.commands["ap1"] = [sys.executable, "-c", VERSION_1]
    domain.kill_agent("ap1")
    domain.start_agent("ap1")
    becomes(lambda: _versions(domain), {"ap1": [1, 1], "ap2": [1, 2], "ap3": [1, 2]})
    with serving(domain), connection(domain, "client1") as talk:
        _roam_and_talk(domain, talk.exchange, ("ap2", "ap1", "ap3"))
        for ap in ("ap1", "ap2"):
            domain.kill_agent(ap)
            talk.exchange(b"nobody at home\n")
            domain.start_agent(ap)
            same_everywhere(domain)
            _roam_and_talk(domain, talk.exchange, ("ap1", "ap2", "ap3"))
            assert talk.source == _source(talk)
    becomes(lambda: _versions(domain), {"ap1": [1, 1], "ap2": [1, 2], "ap3": [1, 2]})
    del domain.agents.commands["ap1"]
    domain.kill_agent("ap1")
    domain.start_agent("ap1")
    becomes(lambda: _versions(domain), {ap: [2, 2] for ap in domain.aps})
    same_everywhere(domain)


def _versions(lab: Lab) -> dict[str, list[int]]:
    return {ap: [peer["protocol_version"] for peer in ask(lab, ap, "peers")] for ap in lab.aps}


def _source(talk: Any) -> str:
    return str(talk.server.getpeername()[0])


def _roam_and_talk(lab: Lab, exchange: Callable[[bytes], None], path: tuple[str, ...]) -> None:
    for ap in path:
        lab.roam("client1", ap)
        served_by(lab, "client1", ap)
        exchange(ap.encode() + b"\n")
        agreed(lab)
        same_everywhere(lab)
