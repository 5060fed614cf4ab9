"""An agent dies in mid-transfer: what is forwarded does not notice, and a new one takes over."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from apagent.lab.lab import Lab
from apagent.lab.measure import Arrivals, Echoes
from apagent.lab.traffic.running import running, serving
from tests.netns.conftest import MakeLab
from tests.netns.observe import (
    SERVER,
    agreed,
    ask,
    becomes,
    installed,
    served_by,
    sessions,
    uplink,
)

pytestmark = pytest.mark.netns

START_S = 10.0
END_S = 30.0
DEAD_S = 0.7
NOISE_MS = 250
"""A pause of a busy machine; without forwarding there would be one of `DEAD_S` at least."""
_CLIENT_KEYS = ("network", "mac", "addresses", "serving_ap", "flows_by_anchor")


@pytest.mark.parametrize("ap", ["ap1", "ap2"], ids=["anchor", "serving"])
def test_an_agent_is_killed_and_started_again(
    lab: MakeLab, ap: str, record_property: Callable[[str, object], None]
) -> None:
    domain = lab(aps=3, clients=1)
    with (
        serving(domain),
        running(domain, "client1", "echo", SERVER, "--rate", 200) as echo,
        running(
            domain, "client1", "download", SERVER, "--size", 12_000_000, "--rate-mbit", 20
        ) as download,
        running(domain, "client1", "lines", SERVER, "--count", 1000, "--interval-ms", 20) as lines,
    ):
        assert download.wait_for("connected", START_S)["address"] == uplink("ap1")
        lines.wait_for("line", START_S)
        becomes(lambda: len(sessions(domain, "ap3")), 3)
        domain.roam("client1", "ap2")
        served_by(domain, "client1", "ap2")
        agreed(domain)
        becomes(lambda: any(_in_grace(domain, other) for other in domain.aps), wanted=False)
        before = states(domain)

        killed_ns = time.monotonic_ns()
        domain.kill_agent(ap)
        lines_then = len(lines.events)
        time.sleep(DEAD_S)
        assert len(lines.events) > lines_then  # forwarded with nobody at home
        domain.start_agent(ap)
        becomes(lambda: states(domain), before)
        mended_ns = time.monotonic_ns()
        assert not download.wait_ended(0)

        domain.roam("client1", "ap3")
        served_by(domain, "client1", "ap3")
        result = download.result(END_S)
        assert (result["completed"], result["sha256_match"]) == (True, True), result
        echo.stop()
        echo.result(END_S)

    silence_ms = Arrivals.of(download.events).longest_silence_ns(killed_ns, mended_ns) / 1e6
    lost = Echoes.of(echo.events).lost(killed_ns, mended_ns)
    record_property("longest_silence_ms", round(silence_ms, 1))
    record_property("echoes_lost", lost)
    assert silence_ms < NOISE_MS
    assert lost <= 2


def states(lab: Lab) -> dict[str, dict[str, Any]]:
    """All that counts of every AP; a claim's generation may grow at a restart."""
    return {ap: {**_told(lab, ap), **installed(lab, ap)} for ap in lab.aps}


def _in_grace(lab: Lab, ap: str) -> bool:
    """Whether a client has just arrived: that is in the kernel for half a second."""
    return "expires" in lab.run(ap, ["nft", "list", "ruleset"]).stdout


def _told(lab: Lab, ap: str) -> dict[str, Any]:
    known = sorted(ask(lab, ap, "clients"), key=lambda client: str(client["mac"]))
    clients = [{key: client[key] for key in _CLIENT_KEYS} for client in known]
    flows = sorted(tuple(flow.items()) for flow in ask(lab, ap, "flows"))
    return {"clients": clients, "flows": flows}
