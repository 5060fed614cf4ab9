"""A roam loses next to nothing, also where the client's carrier drops.

The bounds are loose, for a busy machine: `make bench-roam` measures against the real budget.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice, pairwise
from statistics import median

import pytest

from apagent.lab.lab import Lab
from apagent.lab.measure import Echoes
from apagent.lab.traffic.running import Running, running, serving
from tests.netns.conftest import MakeLab
from tests.netns.observe import SERVER

pytestmark = pytest.mark.netns

ROUND = ("ap2", "ap3", "ap1")
ROAMS = 9
RATE = 1000
DWELL_S = 0.25
MEDIAN_AT_MOST_MS = 50
"""Of the time to the first echo: ten times the budget, a twentieth of a client's ARP timeout."""
LOST_AT_MOST = 100 * ROAMS
"""By all roams together; a client without its gateway would lose `DWELL_S` of every one."""
ARP_RETRY_S = 1.0
"""A client's time between two ARP requests (Linux: net.ipv4.neigh.*.retrans_time_ms)."""
MUTE = (
    "table arp mute { chain input { type filter hook input priority 0;"
    " arp operation reply drop; }; }"
)


@pytest.fixture(scope="module")
def domain(module_lab: MakeLab) -> Iterator[Lab]:
    made = module_lab(aps=3, clients=1)
    with serving(made):
        yield made


@contextlib.contextmanager
def echo(lab: Lab) -> Iterator[Running]:
    with running(lab, "client1", "echo", SERVER, "--rate", RATE) as started:
        started.wait_for("started", 10.0)
        time.sleep(0.2)
        yield started
        started.stop()
        started.result(10.0)


@pytest.mark.parametrize("carrier", [False, True], ids=["carrier-stays", "carrier-drops"])
def test_a_roam_loses_little(
    domain: Lab, carrier: bool, record_property: Callable[[str, object], None]
) -> None:
    began, linked = [], []
    with echo(domain) as traffic:
        for ap in islice(cycle(ROUND), ROAMS):
            began.append(time.monotonic_ns())
            linked.append(domain.roam("client1", ap, carrier=carrier))
            time.sleep(DWELL_S)
    echoes = Echoes.of(traffic.events)
    gaps_ms = [_gap_ms(echoes, up) for up in linked]
    lost = [echoes.lost(a, b) for a, b in pairwise([*linked, time.monotonic_ns()])]
    record_property("gaps_ms", gaps_ms)
    record_property("lost", lost)
    assert median(gaps_ms) < MEDIAN_AT_MOST_MS
    assert sum(lost) < LOST_AT_MOST
    assert traffic.result(0)["sources"][1:] == []


def test_without_the_announcement_it_would_take_a_second(
    domain: Lab, record_property: Callable[[str, object], None]
) -> None:
    """The client doesn't hear what the AP announces, only the answer to its next ARP request."""
    with echo(domain) as traffic:
        domain.run("client1", ["nft", MUTE])
        linked = domain.roam("client1", "ap2", carrier=True)
        time.sleep(0.3)
        domain.run("client1", ["nft", "delete", "table", "arp", "mute"])
        time.sleep(2 * ARP_RETRY_S)
    gap_ms = _gap_ms(Echoes.of(traffic.events), linked)
    record_property("gap_ms", gap_ms)
    assert gap_ms > 500


def _gap_ms(echoes: Echoes, linked_ns: int) -> float:
    gap_ns = echoes.interruption_ns(linked_ns)
    assert gap_ns is not None
    return round(gap_ns / 1e6, 1)
