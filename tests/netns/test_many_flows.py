"""A roam costs the same with one flow and with ten thousand."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import pytest

from apagent.lab import namespaces
from apagent.lab.lab import Lab
from apagent.lab.measure import Echoes
from apagent.lab.traffic.running import running, serving
from tests.netns.conftest import MakeLab
from tests.netns.observe import SERVER, agreed, ask, becomes, served_by, tunnelled
from tests.netns.sockets import udp_socket

pytestmark = pytest.mark.netns

FLOWS = 10_000
FIRST_PORT = 20_000
PATH = ("ap2", "ap3", "ap1", "ap2")
DWELL_S = 0.4
RATE = 1000
LOST_AT_MOST = 50
"""Echoes at 1 kHz in a roam: far above what a roam takes, far below what it would without us."""
SPREAD_S = 30.0
_UDP_TIMEOUT_S = 120


def test_the_interruption_does_not_grow_with_the_flows(
    lab: MakeLab, record_property: Callable[[str, object], None]
) -> None:
    domain = lab(aps=3, clients=1)
    for ap in domain.aps:
        with namespaces.inside(domain.namespace(ap)):
            namespaces.set_sysctl("netfilter/nf_conntrack_udp_timeout", _UDP_TIMEOUT_S)
    with serving(domain):
        one = roams(domain)
        took_s = open_flows(domain)
        many = roams(domain)
        known = [len(tunnelled(domain, ap)) for ap in ("ap2", "ap3")]

    report = {
        "sessions_everywhere_after_s": round(took_s, 2),
        "interruptions_ms_with_1_flow": one[0],
        f"interruptions_ms_with_{FLOWS}_flows": many[0],
        "lost_with_1_flow": one[1],
        f"lost_with_{FLOWS}_flows": many[1],
    }
    for name, value in report.items():
        record_property(name, value)
        print(f"{name}: {value}")  # noqa: T201 - the figures are what the test is for
    assert min(known) >= FLOWS
    assert max(one[1]) < LOST_AT_MOST
    assert max(many[1]) < LOST_AT_MOST
    assert median(many[0]) < median(one[0]) + LOST_AT_MOST


def open_flows(lab: Lab) -> float:
    """Open the flows at ap1; seconds until every AP knows all of them and sends them there."""
    lab.roam("client1", "ap1")
    served_by(lab, "client1", "ap1")
    started = time.monotonic()
    with udp_socket(lab, "client1") as udp:
        for port in range(FIRST_PORT, FIRST_PORT + FLOWS):
            udp.sendto(b"hello", (SERVER, port))
        becomes(lambda: [_knows_all(lab, ap) for ap in lab.aps], [True] * 3, SPREAD_S)
    return time.monotonic() - started


def _knows_all(lab: Lab, ap: str) -> bool:
    # The agent installs what it has heard before it answers.
    status = ask(lab, ap, "status")
    return int(status["own_sessions"] + status["peer_sessions"]) >= FLOWS


def roams(lab: Lab) -> tuple[list[float], list[int]]:
    """Roam along the path with an echo; interruption (ms) and lost echoes of each roam."""
    lab.roam("client1", "ap1")
    served_by(lab, "client1", "ap1")
    steps = []
    with running(lab, "client1", "echo", SERVER, "--rate", RATE) as echo:
        echo.wait_for("started", 10.0)
        time.sleep(DWELL_S)
        for ap in PATH:
            began_ns = time.monotonic_ns()
            steps.append((began_ns, lab.roam("client1", ap)))
            time.sleep(DWELL_S)
        echo.stop()
        result = echo.result(10.0)
        assert len(result["sources"]) == 1
        echoes = Echoes.of(echo.events)
    agreed(lab)
    interruptions = [echoes.interruption_ns(up) for _, up in steps]
    lost = [echoes.lost(began - 5_000_000, began + int(DWELL_S * 1e9)) for began, _ in steps]
    return [round((gap or 1e12) / 1e6, 1) for gap in interruptions], lost
