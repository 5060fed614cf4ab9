"""A client that comes back is claimed again, whatever bridges and neighbour tables remember."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from apagent.lab.faults import Faults, Way
from apagent.lab.lab import Lab
from apagent.lab.plan import RADIO
from apagent.lab.traffic.running import running, serving
from tests.netns import observe
from tests.netns.conftest import MakeLab
from tests.netns.observe import (
    SERVER,
    agreed,
    ask,
    becomes,
    mac,
    nearby,
    served_by,
    sessions,
    uplink,
)
from tests.netns.sockets import connection

pytestmark = pytest.mark.netns

PATH = ("ap2", "ap1", "ap3", "ap1", "ap2", "ap1", "ap3", "ap2", "ap1")
DWELL_S = 0.15


@pytest.fixture(scope="module")
def domain(module_lab: MakeLab) -> Lab:
    return module_lab(aps=3, clients=1)


@pytest.mark.parametrize("silent", [False, True], ids=["with-update-frame", "silent"])
def test_a_client_that_returns_at_once_is_claimed_again(
    domain: Lab, silent: bool, record_property: Callable[[str, object], None]
) -> None:
    domain.roam("client1", "ap1")
    served_by(domain, "client1", "ap1")
    claimed_ms = []
    with (
        serving(domain),
        running(domain, "client1", "echo", SERVER, "--rate", 200) as echo,
        running(domain, "client1", "lines", SERVER, "--count", 2000, "--interval-ms", 10) as lines,
    ):
        assert lines.wait_for("connected", 10.0)["address"] == uplink("ap1")
        becomes(lambda: len(sessions(domain, "ap3", "--protocol", "tcp")) >= 1, True)
        agreed(domain)
        for ap in PATH:
            up = time.monotonic_ns()
            domain.roam("client1", ap, silent=silent)
            served_by(domain, "client1", ap)
            claimed_ms.append(round((time.monotonic_ns() - up) / 1e6, 1))
            time.sleep(DWELL_S)
            assert all(not _near(domain, other) for other in domain.aps if other != ap)
        so_far = len(lines.events)
        becomes(lambda: len(lines.events) > so_far + 5, True)
        echo.stop()
        result = echo.result(10.0)
    assert len(result["sources"]) == 1
    assert result["lost"] < 0.2 * result["sent"]
    record_property("known_everywhere_after_ms", claimed_ms)
    record_property("echoes_lost", f"{result['lost']} of {result['sent']}")


def _near(lab: Lab, ap: str) -> set[str]:
    return {entry for entry in nearby(lab, ap) if mac(lab, "client1") in entry}


def test_the_first_packet_alone_triggers_the_claim(domain: Lab) -> None:
    domain.roam("client1", "ap1")
    served_by(domain, "client1", "ap1")
    with connection(domain, "client1") as opened:
        becomes(lambda: len(sessions(domain, "ap2", "--protocol", "tcp")) >= 1, True)
        agreed(domain)
        for ap in ("ap2", "ap3"):
            domain.run(ap, ["bridge", "link", "set", "dev", RADIO, "learning", "off"])
            domain.roam("client1", ap, silent=True)
            opened.exchange(b"here I am")
            served_by(domain, "client1", ap)
            shown = ask(domain, ap, "client", "show", mac(domain, "client1"))
            assert shown["roams"][0]["source"] == "data"
            assert shown["roams"][0]["to_ap"] == ap


def test_a_silent_client_that_came_back_before_we_heard_of_its_leave_is_found(
    lab: MakeLab,
) -> None:
    """Our bridge has it all the time, so nothing tells that it is here again."""
    domain = lab(aps=2, clients=1)
    faults = Faults(domain)
    domain.run("client1", ["ping", "-c", "1", "-W", "2", SERVER])
    served_by(domain, "client1", "ap1")
    faults.part("ap1", "ap2", Way.CONTROL)
    domain.roam("client1", "ap2")
    becomes(lambda: observe.serving(domain, "client1"), ["ap1", "ap2"])
    domain.roam("client1", "ap1")
    faults.heal()
    served_by(domain, "client1", "ap1")
