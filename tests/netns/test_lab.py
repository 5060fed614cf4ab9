"""The lab, with ordinary NAT in its APs: what it builds, how clients roam, what it leaves."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import IPv4Address
from typing import Any

import pytest

from apagent.kernel.rtnetlink import bridge_entries
from apagent.lab import build, namespaces, state
from apagent.lab.errors import LabError, LabNotUp, UnknownNode
from apagent.lab.lab import Lab, take_down
from apagent.lab.place import Place
from apagent.lab.plan import RADIO, SECOND_SERVER_ADDRESS, SERVER_ADDRESS, UPLINK
from apagent.lab.status import inspect

pytestmark = pytest.mark.netns

TIMEOUT_S = 5.0


@pytest.fixture(scope="module")
def small(module_lab: Any) -> Lab:
    """Two APs and two clients; client1 starts at ap1, client2 at ap2."""
    made: Lab = module_lab(aps=2, clients=2, agents=False)
    return made


@pytest.fixture(autouse=True)
def _everybody_at_home(request: pytest.FixtureRequest) -> None:
    if "small" in request.fixturenames:
        small: Lab = request.getfixturevalue("small")
        small.roam("client1", "ap1")
        small.roam("client2", "ap2")


@contextlib.contextmanager
def udp_socket(lab: Lab, node: str) -> Iterator[socket.socket]:
    with namespaces.inside(lab.namespace(node)):
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with udp:
        udp.settimeout(TIMEOUT_S)
        yield udp


def address_at_the_server(lab: Lab, client: str) -> str:
    """The source address of a datagram that the client sends from a new socket."""
    with udp_socket(lab, "server") as server, udp_socket(lab, client) as new:
        server.bind((str(SERVER_ADDRESS), 0))
        new.sendto(b"hello", server.getsockname())
        _, (address, _) = server.recvfrom(100)
        server.sendto(b"welcome", (address, _))
        assert new.recv(100) == b"welcome"
    return str(address)


def known_at(lab: Lab, ap: str, client: str) -> bool:
    """Whether the AP's bridge knows the client as behind its radio."""
    lan, radio = (lab.plan.interface(ap, name).index for name in ("br-lan", RADIO))
    with build.route_socket(lab.place, ap) as netlink:
        entries = bridge_entries(netlink, lan)
    mac = lab.plan.station(client).mac
    return any(entry.mac == mac and entry.ifindex == radio for entry in entries)


def neighbours(lab: Lab, client: str) -> str:
    return lab.run(client, ["ip", "neigh", "show", "10.77.0.1"]).stdout


def test_each_client_goes_out_by_its_own_ap(small: Lab) -> None:
    assert address_at_the_server(small, "client1") == "203.0.113.11"
    assert address_at_the_server(small, "client2") == "203.0.113.12"


def test_the_server_answers_at_both_addresses(small: Lab) -> None:
    for address in (SERVER_ADDRESS, SECOND_SERVER_ADDRESS):
        small.run("client1", ["ping", "-c1", "-W2", str(address)])


def test_a_client_roams(small: Lab) -> None:
    before = small.run("client1", ["ip", "-o", "address", "show", RADIO]).stdout
    assert small.location("client1") == "ap1"
    small.roam("client1", "ap2")
    assert small.location("client1") == "ap2"
    assert small.locations() == {"client1": "ap2", "client2": "ap2"}
    assert address_at_the_server(small, "client1") == "203.0.113.12"
    assert small.run("client1", ["ip", "-o", "address", "show", RADIO]).stdout == before


def test_the_new_ap_learns_the_client_from_its_frame(small: Lab) -> None:
    small.run("client1", ["ping", "-c1", "-W2", "10.77.0.1"])
    small.roam("client1", "ap2")
    assert known_at(small, "ap2", "client1")
    assert known_at(small, "ap1", "client1")  # stale, as on a real AP


def test_a_silent_roam_tells_nobody(lab: Any) -> None:
    fresh: Lab = lab(aps=2, clients=1, agents=False)
    fresh.roam("client1", "ap2", silent=True)
    assert not known_at(fresh, "ap2", "client1")
    fresh.roam("client1", "ap2")
    assert known_at(fresh, "ap2", "client1")


def test_the_carrier_stays_unless_asked(small: Lab) -> None:
    small.run("client1", ["ping", "-c1", "-W2", "10.77.0.1"])
    small.roam("client1", "ap2")
    assert "lladdr" in neighbours(small, "client1")
    small.roam("client1", "ap1", carrier=True)
    assert "lladdr" not in neighbours(small, "client1")  # the kernel's answer to a lost carrier
    assert address_at_the_server(small, "client1") == "203.0.113.11"


def test_roam_refuses_what_is_not_there(small: Lab) -> None:
    with pytest.raises(UnknownNode, match="'ap3' is not an AP"):
        small.roam("client1", "ap3")
    with pytest.raises(UnknownNode, match="'ap1' is not a client"):
        small.roam("ap1", "ap2")


def test_ordinary_traffic_is_no_leak(small: Lab) -> None:
    with small.watch_for_leaks() as leaks:
        assert address_at_the_server(small, "client1") == "203.0.113.11"
        small.roam("client1", "ap2")
        small.run("client1", ["ping", "-c3", "-i0.2", "-W2", str(SERVER_ADDRESS)])
    assert leaks.packets() == []
    assert leaks.count() == 0


@pytest.mark.parametrize("source", ["10.77.1.1", "198.51.100.10"])
def test_every_leak_is_counted(small: Lab, source: str) -> None:
    packets = 20_000
    with small.watch_for_leaks() as leaks:
        send_out(small, "ap1", source, "10.77.1.1", packets)
        assert leaks.count() == packets
        assert leaks.count() == packets
    assert leaks.count() == packets
    evidence = leaks.packets()
    assert 0 < len(evidence) <= packets
    assert str(evidence[0]) == f"{source} > 10.77.1.1 protocol 17 on ap1"


def send_out(lab: Lab, ap: str, source: str, destination: str, count: int) -> None:
    """Send IPv4 packets straight out of the AP's uplink, past its NAT."""
    addresses = IPv4Address(source).packed + IPv4Address(destination).packed
    frame = bytes.fromhex("020000000bad 02000000cafe 0800")
    frame += bytes((0x45, 0, 0, 20, 0, 0, 0, 0, 64, 17, 0, 0)) + addresses
    with namespaces.inside(lab.namespace(ap)):
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    with raw:
        raw.bind((UPLINK, 0))
        for _ in range(count):
            raw.send(frame)


def test_programs_run_inside(small: Lab) -> None:
    assert "10.77.1.2/16" in small.run("client2", ["ip", "address"]).stdout
    socket_path = small.run("ap2", ["printenv", "APAGENT_SOCKET"]).stdout.strip()
    assert socket_path == str(small.place.root / "ap2" / "control.sock")
    assert small.run("client2", ["printenv", "APAGENT_SOCKET"], check=False).returncode == 1
    with pytest.raises(LabError, match="false on server ended with 1"):
        small.run("server", ["false"])
    with pytest.raises(LabError, match="sleep 9 on server takes over"):
        small.run("server", ["sleep", "9"], timeout=0.05)


def test_status(small: Lab) -> None:
    status = inspect(small)
    assert (status["state"], status["agents"]) == ("up", False)
    assert all(node["present"] and node["agent"] is None for node in status["nodes"])
    assert status["clients"][0] == {
        "client": "client1",
        "ap": "ap1",
        "address": "10.77.1.1",
        "mac": "02:00:00:00:01:01",
    }


def test_another_process_finds_it(small: Lab) -> None:
    other = Lab.open(small.place)
    assert other.nodes == small.nodes
    other.roam("client1", "ap2")
    other.close()
    assert small.location("client1") == "ap2"


def test_a_second_lab_at_the_same_place_is_refused(small: Lab) -> None:
    with pytest.raises(LabError, match=r"there is a lab in .* already; `apagent lab down`"):
        Lab(1, 0, agents=False, place=small.place).up()
    assert small.location("client1") == "ap1"


def test_two_labs_coexist(small: Lab, place: Place) -> None:
    with Lab(1, 1, agents=False, place=place) as other:
        assert address_at_the_server(other, "client1") == "203.0.113.11"
    assert address_at_the_server(small, "client1") == "203.0.113.11"


def test_down_ends_what_runs_inside_and_is_idempotent(place: Place) -> None:
    lab = Lab(1, 1, agents=False, place=place)
    lab.up()
    with lab.popen("client1", ["sleep", "60"]) as sleeper:
        lab.down()
        assert sleeper.wait(TIMEOUT_S) != 0
    lab.down()
    with pytest.raises(LabNotUp):
        Lab.open(place)


def test_down_spares_a_namespace_of_another_prefix(place: Place) -> None:
    other = place.prefix + "other-ap1"
    namespaces.create(other)
    try:
        with Lab(1, 0, agents=False, place=place):
            pass
        assert other in namespaces.names()
    finally:
        namespaces.remove(other)


def test_an_interrupted_up_cleans_up_itself(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "_make_links", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Lab(2, 1, agents=False, place=place).up()
    assert not place.root.exists()
    assert not [name for name in namespaces.names() if place.owns(name)]


_KILLED_UP = """
import itertools, os, signal, sys
from apagent.lab import namespaces
from apagent.lab.lab import Lab
from apagent.lab.place import Place

function, last_call, prefix = sys.argv[1], int(sys.argv[2]), sys.argv[3]
original = getattr(namespaces, function)
calls = itertools.count(1)

def dying(*arguments):
    if next(calls) == last_call:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)

setattr(namespaces, function, dying)
Lab(2, 1, agents=False, place=Place.of(prefix)).up()
"""


@pytest.mark.parametrize(("function", "call"), [("_mount", 4), ("set_sysctl", 7), ("inside", 13)])
def test_down_clears_what_a_killed_up_left(place: Place, function: str, call: int) -> None:
    argv = [sys.executable, "-c", _KILLED_UP, function, str(call), place.prefix]
    assert subprocess.run(argv, timeout=20, check=False).returncode == -9
    with contextlib.closing(Lab.open(place)) as left:
        assert inspect(left)["state"] == state.BUILDING
    with pytest.raises(LabError, match="`apagent lab down`"):
        Lab(2, 1, agents=False, place=place).up()
    take_down(place)


def test_leftover_namespaces_without_a_state_are_reported(place: Place) -> None:
    namespaces.create(place.namespace("ap1"))
    with pytest.raises(LabError, match="namespaces of another lab"):
        Lab(1, 0, agents=False, place=place).up()
    take_down(place)
