"""Hundreds of flows at once survive the death of their anchor, or its drain."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from apagent.lab.faults import Faults
from apagent.lab.lab import Lab
from apagent.lab.measure import Echoes
from apagent.lab.traffic.running import running, serving
from tests.chaos.flows import Flows, flowing
from tests.chaos.record import Record, records
from tests.chaos.schedule import Kind, Talk
from tests.netns.conftest import MakeLab
from tests.netns.observe import SERVER, agreed, becomes, served_by, sessions

pytestmark = pytest.mark.netns

NOTE = Callable[[str, object], None]
EACH = 100
KINDS = {number: (Kind.UP, Kind.UDP)[number % 2] for number in range(2 * EACH)}
CLIENT = "client1"
SUCCESSION_S = 3.0
"""Far above what it takes (under a second): the machine may be busy."""


@contextmanager
def many_flows(lab: Lab) -> Iterator[Flows]:
    """A hundred connections and a hundred sockets, opened at ap1, and known to all APs."""
    with flowing(lab, 120.0) as flows:
        for number, kind in KINDS.items():
            flows.open(Talk(number, CLIENT, kind, 0.0, 0.0))
        becomes(lambda: len(sessions(lab, "ap3")), len(KINDS), 20.0)
        lab.roam(CLIENT, "ap2")
        served_by(lab, CLIENT, "ap2")
        agreed(lab)
        yield flows


def ended(flows: Flows, start_ns: int) -> list[Record]:
    return records(KINDS, *flows.finish(10.0), start_ns)


def survived(made: list[Record], address: str) -> None:
    assert [(one.flow, one.loss) for one in made if one.loss is not None] == []
    assert len(made) == len(KINDS)
    assert {one.address for one in made} == {address}


def test_all_flows_survive_the_death_of_their_anchor(lab: MakeLab, record_property: NOTE) -> None:
    domain = lab(aps=3, clients=1, takeover=True)
    faults = Faults(domain)
    with many_flows(domain) as flows:
        time.sleep(1.0)
        died_ns = faults.power_off("ap1")
        time.sleep(3.0)
        made = ended(flows, died_ns)
    survived(made, str(domain.plan.nat_address("ap1")))
    back = sorted(end for one in made for begin, end in one.gaps if begin <= 0.05 < end)
    record_property("first_packet_s", round(back[0], 3))
    record_property("last_flow_s", round(back[-1], 3))
    assert back[0] < SUCCESSION_S


def test_all_flows_survive_a_drain_and_it_costs_an_echo_hardly_a_packet(
    lab: MakeLab, record_property: NOTE
) -> None:
    domain = lab(aps=3, clients=2, takeover=True)
    domain.roam("client2", "ap1")
    with (
        serving(domain),
        many_flows(domain) as flows,
        running(domain, "client2", "echo", SERVER, "--rate", 1000, "--duration-s", 60) as echo,
    ):
        echo.wait_for("started", 10.0)
        agreed(domain)
        began_ns = time.monotonic_ns()
        domain.run("ap1", ["apctl", "drain", "ap1", "--wait", "--timeout", "20"])
        time.sleep(1.0)
        ended_ns = time.monotonic_ns()
        made = ended(flows, began_ns)
        echo.stop()
        echo.result(10.0)
    survived(made, str(domain.plan.nat_address("ap1")))
    lost = Echoes.of(echo.events).lost(began_ns, ended_ns)
    record_property("echoes_lost_by_the_drain", lost)
    assert lost <= 5
