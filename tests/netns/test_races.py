"""Flows that nobody else knows of yet when their client roams, and flows that two APs know."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import pytest

from apagent.lab.lab import Lab
from tests.netns.conftest import MakeLab
from tests.netns.early_flows import early, echoing, known_to, settled, stopped
from tests.netns.nat_support import roam
from tests.netns.observe import eventually, served_by, uplink

pytestmark = pytest.mark.netns

CLIENTS = 9
LAST_MS = 5
FLOWS = 10
"""TCP connections and UDP sockets that are opened in the last milliseconds before a roam."""


@pytest.fixture(scope="module")
def domain(module_lab: MakeLab) -> Lab:
    return module_lab(aps=3, clients=CLIENTS)


def test_flows_opened_just_before_a_roam_go_on(
    domain: Lab, record_property: Callable[[str, object], None]
) -> None:
    roam(domain, "client1", "ap1")
    opened, kept, twice, slowest_s = 0, 0, 0, 0.0
    for before, after in (("ap1", "ap2"), ("ap2", "ap3"), ("ap3", "ap1"), ("ap1", "ap3")):
        with echoing(domain) as server, early(domain, "client1", FLOWS) as pairs:
            for pair in pairs:
                pair.open(server)
                time.sleep(LAST_MS / 1e3 / FLOWS)
            domain.roam("client1", after)
            began = time.monotonic()
            for pair in pairs:
                pair.exchange()
            slowest_s = max(slowest_s, time.monotonic() - began)
            anchors = settled(domain, "client1")
            for pair in pairs:
                pair.exchange()
            ours = {
                (protocol, port): anchor
                for (protocol, port, _, remote_port), anchor in anchors.items()
                if remote_port in server.ports
            }
            assert len(ours) == 2 * FLOWS
            for pair in pairs:
                anchor = ours["udp", pair.datagrams.getsockname()[1]]
                assert server.sources[pair.name][-1] == uplink(anchor)
                twice += len(set(server.sources[pair.name])) - 1
            opened += 2 * FLOWS
            kept += sum(anchor == before for anchor in ours.values())
        served_by(domain, "client1", after)
    record_property("opened", opened)
    record_property("anchored_where_they_were_opened", kept)
    record_property("sockets_translated_twice_for_a_while", twice)
    record_property("slowest_s", round(slowest_s, 2))


@pytest.mark.parametrize(("first", "second"), [("ap1", "ap2"), ("ap3", "ap1"), ("ap2", "ap3")])
def test_a_flow_that_two_aps_translate_ends_with_one_anchor(
    domain: Lab, first: str, second: str
) -> None:
    roam(domain, "client1", first)
    with echoing(domain) as server, early(domain, "client1", 1) as (pair,):
        with stopped(domain, first):
            pair.open(server)
            eventually(lambda: pair.name in server.sources)
            domain.roam("client1", second)
            known_to(domain, "client1", second, second)
            eventually(lambda: _is_seen_twice(pair.datagrams, server.sources[pair.name]))
            time.sleep(0.1)
        anchors = settled(domain, "client1")
        pair.exchange()
        assert settled(domain, "client1") == anchors
        port = pair.datagrams.getsockname()[1]
        (anchor,) = {a for (proto, p, _, _), a in anchors.items() if (proto, p) == ("udp", port)}
        pair.exchange()
        assert server.sources[pair.name][-1] == uplink(anchor)


def _is_seen_twice(datagrams: socket.socket, sources: list[str]) -> bool:
    """Send; whether the server has seen the socket with two addresses."""
    datagrams.send(b"0 again")
    return len(set(sources)) == 2


@pytest.mark.parametrize("number", range(2, CLIENTS + 1))
def test_a_client_that_roams_with_its_first_packet_keeps_its_connection(
    domain: Lab, number: int
) -> None:
    """Nobody knows its address yet when it leaves, some hundred microseconds to milliseconds on."""
    client = f"client{number}"
    here = domain.location(client)
    there = domain.aps[(domain.aps.index(here) + 1) % len(domain.aps)]
    with echoing(domain) as server, early(domain, client, 1) as (pair,):
        pair.open(server)
        time.sleep((number - 2) * 0.0005)
        domain.roam(client, there)
        pair.exchange()
        served_by(domain, client, there)
        settled(domain, client)
        pair.exchange()
