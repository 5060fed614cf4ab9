"""A new release takes the place of an old one: the kernel's state changes, and no flow notices."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from apagent.lab.lab import Lab
from apagent.lab.traffic.running import serving
from apagent.peers.versions import HIGHEST
from tests.netns import former_layout
from tests.netns import test_moving_forwards as moving_forwards
from tests.netns.conftest import MakeLab
from tests.netns.crashing import CHANGES
from tests.netns.deaths import make_mortal, start_to_die
from tests.netns.observe import agreed, ask, becomes, served_by
from tests.netns.observe import sessions as known_sessions
from tests.netns.steady import ANSWER_S, Steady, steady
from tests.netns.test_feed import VERSION_1
from tests.netns.test_restart import states

pytestmark = pytest.mark.netns

CLIENT = "client1"
NOISE = 3
WATCHED_S = 0.5
DIES_AFTER = (2, 4)
"""Changes after which an agent dies that upgrades an AP; the next one goes on from there."""
DOWN_S = 1.5
"""Longer than peers wait for an answer from an anchor."""
_DEAF = """
table inet deaf {
    chain input {
        type filter hook input priority 0;
        iifname "apv-lan" icmp type echo-request drop
    }
}
"""


@pytest.mark.parametrize("revision", ["4db3919", "a703e70"])
def test_an_ap_with_a_former_layout_is_upgraded_in_place(lab: MakeLab, revision: str) -> None:
    domain = lab(aps=3, clients=1)
    with serving(domain), steady(domain, CLIENT) as traffic:
        traffic.add("at ap1")
        becomes(lambda: len(known_sessions(domain, "ap3")), 3)
        domain.roam(CLIENT, "ap2")
        served_by(domain, CLIENT, "ap2")
        traffic.add("at ap2")
        becomes(lambda: len(known_sessions(domain, "ap3")), 6)
        agreed(domain)
        time.sleep(WATCHED_S)
        present = shape(domain, "ap2")

        domain.kill_agent("ap2")
        with traffic.paused():
            former_layout.install(domain, "ap2", revision)
        assert forwards(traffic)
        began = time.monotonic()
        make_mortal(domain, "ap2")
        for changes in DIES_AFTER:
            start_to_die(domain, "ap2", f"after {changes} {CHANGES}")
        domain.start_agent("ap2")
        assert forwards(traffic, began)
        agreed(domain)
        assert shape(domain, "ap2") == present
        # The anchors' numbers are the former ones still: what they are is nobody's business.
        upgraded = states(domain)
        domain.kill_agent("ap2")
        domain.start_agent("ap2")
        becomes(lambda: states(domain), upgraded)


def test_an_anchor_of_a_former_release_is_upgraded_in_place(lab: MakeLab) -> None:
    """It speaks version 1 of the feed, and its kernel doesn't answer probes."""
    domain = lab(aps=3, clients=1)
    domain.run("ap1", ["nft", _DEAF])
    domain.agents.commands["ap1"] = [sys.executable, "-c", VERSION_1]
    for ap in domain.aps:
        domain.kill_agent(ap)
        domain.start_agent(ap)
    with serving(domain), steady(domain, CLIENT) as traffic:
        traffic.add("at ap1")
        becomes(lambda: len(known_sessions(domain, "ap3")), 3)
        domain.roam(CLIENT, "ap2")
        served_by(domain, CLIENT, "ap2")
        agreed(domain)
        assert forwards(traffic)

        began = time.monotonic()
        domain.kill_agent("ap1")
        time.sleep(DOWN_S)
        del domain.agents.commands["ap1"]
        domain.start_agent("ap1")
        domain.run("ap1", ["nft", "delete", "table", "inet", "deaf"])
        assert forwards(traffic, began)
        agreed(domain)
        versions = {peer["protocol_version"] for peer in ask(domain, "ap2", "peers")}
        assert versions == {HIGHEST}


def test_port_forwards_that_were_rules_are_upgraded_in_place(lab: MakeLab) -> None:
    made = moving_forwards.domain(lab)
    made.roam(CLIENT, "ap1")
    served_by(made, CLIENT, "ap1")
    connected: list[float] = []
    upgraded = threading.Event()

    def connect(listener: socket.socket) -> None:
        while not upgraded.is_set():
            assert moving_forwards.lets_in(made, listener)
            connected.append(time.monotonic())

    with moving_forwards.let_in(made) as (moved, listener):
        assert moving_forwards.is_at(made, "ap1", moved)
        present = shape(made, "ap1")
        made.kill_agent("ap1")
        former_layout.install(made, "ap1", "c391e4c")
        assert moved.go_on()
        assert shape(made, "ap1") != present
        with ThreadPoolExecutor(1) as outside:
            connecting = outside.submit(connect, listener)
            becomes(lambda: len(connected) > NOISE or connecting.done(), wanted=True)
            made.start_agent("ap1")
            time.sleep(WATCHED_S)
            upgraded.set()
            connecting.result()
        assert moving_forwards.is_at(made, "ap1", moved)
        assert moved.go_on()
        becomes(lambda: shape(made, "ap1"), present)


def shape(lab: Lab, ap: str) -> Counter[tuple[str, ...]]:
    """How many objects of each name there are in the table, and how many rules and routes."""
    listing = json.loads(lab.run(ap, ["nft", "-j", "list", "table", "inet", "apagent"]).stdout)
    found = Counter(
        (kind, str(item.get("chain", item.get("name"))))
        for entry in listing["nftables"]
        for kind, item in entry.items()
    )
    for what in (("rule",), ("route", "show", "table", "all", "proto", "176")):
        found[what] = len(lab.run(ap, ["ip", *what]).stdout.splitlines())
    return found


def forwards(traffic: Steady, began: float | None = None) -> bool:
    began = began or time.monotonic()
    time.sleep(WATCHED_S + ANSWER_S)
    lost = traffic.lost(began, time.monotonic() - ANSWER_S)
    assert traffic.ended() == {}
    assert {flow: count for flow, count in lost.items() if count > NOISE} == {}
    return True
