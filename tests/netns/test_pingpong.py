"""A client that roams to and fro, claims that meet, and APs that all come to the same view."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice

import pytest

from apagent.cli.agent_client import agent
from apagent.lab.lab import Lab
from apagent.lab.plan import RADIO
from apagent.lab.traffic.running import running, serving
from apagent.v1.control_pb2 import AssociateRequest, GetStatusRequest
from tests.netns.conftest import MakeLab
from tests.netns.observe import SERVER, address, ask, becomes, eventually, mac

pytestmark = pytest.mark.netns

ROAMS, INTERVAL_S = 100, 0.05
SIZE, RATE_MBIT = 12_000_000, 16
TUNNEL = "apv-lan"
CLIENT = "client2"
MEETINGS = 12


@pytest.fixture(scope="module")
def domain(module_lab: MakeLab) -> Iterator[Lab]:
    made = module_lab(aps=3, clients=2)
    with serving(made):
        yield made


def places(lab: Lab, client: str) -> list[tuple[str, int]]:
    """The client's serving AP and the generation of its claim, as each AP has them."""
    shown = [ask(lab, ap, "client", "show", mac(lab, client)) for ap in lab.aps]
    return [(str(each["serving_ap"]), int(each["generation"])) for each in shown]


def agreed(lab: Lab, client: str) -> tuple[str, int]:
    """Wait until all APs say the same; what they say."""

    def same() -> tuple[str, int] | None:
        found = set(places(lab, client))
        return found.pop() if len(found) == 1 else None

    place = eventually(same)
    assert place is not None
    return place


def sent(lab: Lab, node: str, device: str) -> int:
    """Packets that the device has sent."""
    text = lab.run(node, ["ip", "-s", "-j", "link", "show", device]).stdout
    return int(json.loads(text)[0]["stats64"]["tx"]["packets"])


def test_a_transfer_survives_a_hundred_roams_at_twenty_a_second(
    domain: Lab, record_property: Callable[[str, object], None]
) -> None:
    options = ("--size", SIZE, "--rate-mbit", RATE_MBIT, "--deadline-s", 60)
    with running(domain, "client1", "download", SERVER, *options) as download:
        download.wait_for("connected", 10.0)
        place, before = agreed(domain, "client1")
        assert place == "ap1"
        crossed = sum(sent(domain, ap, TUNNEL) for ap in domain.aps)
        handled = sent(domain, "client1", RADIO) + sent(domain, "server", "eth0")
        for ap in islice(cycle(("ap2", "ap3", "ap1")), ROAMS):
            domain.roam("client1", ap)
            time.sleep(INTERVAL_S)
        result = download.result(60.0)
        crossed = sum(sent(domain, ap, TUNNEL) for ap in domain.aps) - crossed
        handled = sent(domain, "client1", RADIO) + sent(domain, "server", "eth0") - handled
    assert (result["completed"], result["sha256_match"]) == (True, True), result
    place, after = agreed(domain, "client1")
    assert place == domain.location("client1") == "ap2"
    assert after > before + ROAMS * 0.8
    record_property("tunnelled_per_packet", round(crossed / handled, 2))
    assert crossed < 2 * handled, "packets go round in circles"


def test_claims_that_meet_are_settled(
    domain: Lab, record_property: Callable[[str, object], None]
) -> None:
    """Two APs are told at the same moment that a client is with them; it itself is silent."""
    domain.run(CLIENT, ["ip", "link", "set", RADIO, "arp", "off"])  # also when it is asked
    winners, settled_ms = [], []
    for _ in range(MEETINGS):
        associate(domain, "ap3")
        _, before = agreed(domain, CLIENT)
        associate(domain, "ap1", "ap2")
        began = time.monotonic()
        place, generation = agreed(domain, CLIENT)
        settled_ms.append(round((time.monotonic() - began) * 1e3))
        becomes(lambda: here(domain), [place])
        assert 0 < generation - before <= 2
        winners.append((place, generation - before))
    domain.run(CLIENT, ["ip", "link", "set", RADIO, "arp", "on"])
    record_property("settled_after_ms", settled_ms)
    record_property("winners", winners)
    # One that was told a moment later has one generation more; with the same, the highest id wins.
    assert all(place == "ap2" for place, ahead in winners if ahead == 1)


def associate(lab: Lab, *aps: str) -> None:
    """What `apctl client associate` does, on several APs at once."""
    request = AssociateRequest(mac=mac(lab, CLIENT), address=address(lab, CLIENT))
    with contextlib.ExitStack() as stack:
        agents = [stack.enter_context(agent(lab.place.control_socket(ap), 5.0)) for ap in aps]
        for stub in agents:
            stub.GetStatus(GetStatusRequest())  # a connection takes longer than a claim
        for answer in [stub.Associate.future(request) for stub in agents]:
            answer.result()


def here(lab: Lab) -> list[str]:
    """The APs whose kernel sends the client's packets to the radio."""
    route = ["ip", "-4", "route", "get", address(lab, CLIENT)]
    return [ap for ap in lab.aps if f" dev {TUNNEL} " not in lab.run(ap, route).stdout]
