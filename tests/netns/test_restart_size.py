"""How long a restart takes with many sessions: those of its own AP, and its peers' in the maps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from ipaddress import IPv4Address

import pytest

from apagent.config import load
from apagent.core.model import TCP, UDP, Flow, FlowKey, Nat, Translation
from apagent.kernel.conntrack import LinuxFlowMonitor
from apagent.lab import namespaces
from apagent.lab.lab import Lab
from tests.netns.conftest import MakeLab
from tests.netns.map_changes import MapChanges
from tests.netns.observe import ask, becomes, uplink

pytestmark = pytest.mark.netns

SESSIONS = 20_000
"""Of each of two APs."""
IN_SYNC_S = 15.0
"""Two to three seconds on a busy machine: this is no noise."""
SPREAD_S = 30.0
_BATCH, _PAUSE_S = 1000, 0.02
_FIRST_PORT, _PORTS = 1024, 60_000


def test_a_restart_with_many_sessions(
    lab: MakeLab, record_property: Callable[[str, object], None]
) -> None:
    domain = lab(aps=2, clients=1)
    for number, ap in enumerate(domain.aps):
        open_flows(domain, ap, IPv4Address("10.77.1.1") + number)
    becomes(lambda: [counts(domain, ap) for ap in domain.aps], [(SESSIONS, SESSIONS)] * 2, SPREAD_S)
    with closing(MapChanges(domain, "ap2")) as changes:
        assert len(changes.present) >= SESSIONS
        domain.kill_agent("ap1")
        began = time.monotonic()
        domain.start_agent("ap1")
        in_sync_s = time.monotonic() - began
        becomes(lambda: [counts(domain, ap) for ap in domain.aps], [(SESSIONS, SESSIONS)] * 2)
        assert changes.of_present() == []
    record_property("in_sync_s", round(in_sync_s, 2))
    assert in_sync_s < IN_SYNC_S


def open_flows(lab: Lab, ap: str, client: IPv4Address) -> None:
    """Put entries into the AP's conntrack table; its agent takes note of them."""
    domain = load(lab.agents.config_file(ap)).domain({}, 1450)
    flows = dict(flows_of(client, IPv4Address(uplink(ap))))
    with namespaces.inside(lab.namespace(ap)), closing(LinuxFlowMonitor(domain.networks)) as adopt:
        keys = list(flows)
        for i in range(0, SESSIONS, _BATCH):
            adopt.adopt(domain.networks[0].name, {key: flows[key] for key in keys[i : i + _BATCH]})
            time.sleep(_PAUSE_S)


def flows_of(client: IPv4Address, outside: IPv4Address) -> Iterator[tuple[FlowKey, Nat]]:
    for number in range(SESSIONS):
        port = _FIRST_PORT + number % _PORTS
        protocol = UDP if number % 2 else TCP
        flow = Flow(protocol, client, port, IPv4Address("198.18.0.1"), 443)
        yield flow.key, Translation(outside, port).packed


def counts(lab: Lab, ap: str) -> tuple[int, int]:
    status = ask(lab, ap, "status")
    return status["own_sessions"], status["peer_sessions"]
