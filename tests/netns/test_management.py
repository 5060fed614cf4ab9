"""`apctl` against running agents: what it reports, what it tells, how it exits."""

from __future__ import annotations

import json
import select
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from apagent.lab import programs
from apagent.lab.lab import Lab
from tests.netns.conftest import MakeLab
from tests.netns.observe import (
    address,
    agreed,
    ask,
    becomes,
    eventually,
    mac,
    served_by,
    sessions,
    uplink,
)
from tests.netns.sockets import connection

pytestmark = pytest.mark.netns

STRANGER = "02:00:00:00:77:77"
NETWORK = {"name", "client_interface", "prefix", "gateway", "vni", "uplink", "nat"}
STATUS = {
    *("ap", "version", "in_sync", "degraded", "uptime_s", "own_sessions", "peer_sessions"),
    *("clients_here", "clients_elsewhere", "clock", "tunnel_mtu", "tcp_mss", "leaked_packets"),
    *("reset_packets", "resyncs", "networks", "sysctls", "tunnel_address", "repairs", "checksum"),
}
PEER = {
    *("id", "address", "underlay", "state", "reason", "sessions", "clients", "epoch"),
    *("sequence", "refused", "snapshots", "deltas", "tunnel_address", "checksum"),
    *("protocol_version", "differences", "changes_received"),
}
CLIENT = {
    *("network", "mac", "addresses", "serving_ap", "generation", "flows_by_anchor"),
    *("since_s", "roams"),
}
ROAM = {"from_ap", "to_ap", "generation", "source", "time", "flows_kept"}
FLOW = {
    *("network", "protocol", "client", "client_port", "remote", "remote_port", "anchor"),
    *("nat_address", "nat_port", "client_mac", "serving_ap"),
}
"""The keys that scripts rely on; there may be more, never fewer."""


@pytest.fixture(scope="module")
def domain(module_lab: MakeLab) -> Lab:
    return module_lab(aps=3, clients=1)


@pytest.fixture(autouse=True)
def _at_ap1(domain: Lab) -> None:
    domain.roam("client1", "ap1")
    served_by(domain, "client1", "ap1")


def apctl(lab: Lab, ap: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The program itself, with its exit code and what it says on stderr."""
    return lab.run(ap, [programs.path("apctl"), *arguments], check=False)


def test_every_read_verb_has_its_keys(domain: Lab) -> None:
    with connection(domain, "client1"):
        becomes(lambda: len(sessions(domain, "ap2")) >= 1, True)
        domain.roam("client1", "ap2")
        served_by(domain, "client1", "ap2")
        status, peers = _json(domain, "status"), _json(domain, "peers")
        clients, flows = _json(domain, "clients"), _json(domain, "flows")
        shown = _json(domain, "client", "show", mac(domain, "client1"))
    assert status.keys() >= STATUS
    assert (status["ap"], status["in_sync"], status["degraded"]) == ("ap1", True, [])
    assert status["leaked_packets"] == 0
    assert status["networks"][0].keys() >= NETWORK
    assert [peer["id"] for peer in peers] == ["ap2", "ap3"]
    assert all(peer.keys() >= PEER and peer["state"] == "in-sync" for peer in peers)
    assert [client["mac"] for client in clients] == [mac(domain, "client1")]
    assert clients[0].keys() >= CLIENT
    assert flows[0].keys() >= FLOW
    assert (flows[0]["anchor"], flows[0]["nat_address"]) == ("ap1", uplink("ap1"))
    assert (flows[0]["serving_ap"], flows[0]["client"]) == ("ap2", address(domain, "client1"))
    assert shown.keys() >= CLIENT
    assert shown["roams"][0].keys() >= ROAM
    assert (shown["roams"][0]["from_ap"], shown["roams"][0]["to_ap"]) == ("ap1", "ap2")
    assert _json(domain, "version").keys() == {"apctl", "agent"}


def _json(lab: Lab, *arguments: str) -> Any:
    done = apctl(lab, "ap1", *arguments, "-o", "json")
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def test_flows_can_be_filtered(domain: Lab) -> None:
    with connection(domain, "client1"):
        flows = becomes_known(domain)
        assert sessions(domain, "ap3", "--client", mac(domain, "client1")) >= flows
        assert sessions(domain, "ap3", "--client", "10.77.1.1", "--protocol", "tcp") >= flows
        assert sessions(domain, "ap3", "--anchor", "ap2").isdisjoint(flows)
        assert sessions(domain, "ap3", "--protocol", "udp").isdisjoint(flows)


def becomes_known(lab: Lab) -> set[Any]:
    eventually(lambda: sessions(lab, "ap3", "--anchor", "ap1", "--protocol", "tcp"))
    return {session for session in agreed(lab) if session.anchor == "ap1"}


def test_an_association_claims(domain: Lab) -> None:
    me = mac(domain, "client1")
    domain.roam("client1", "ap3", silent=True)
    done = apctl(domain, "ap3", "client", "associate", me.replace(":", "-").upper(), "-o", "json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["serving_ap"] == "ap3"
    served_by(domain, "client1", "ap3")
    assert ask(domain, "ap3", "client", "show", me)["roams"][0]["source"] == "management"

    done = apctl(domain, "ap2", "client", "associate", STRANGER, "--address", "10.77.5.5")
    assert done.returncode == 0
    becomes(lambda: ask(domain, "ap1", "client", "show", STRANGER)["serving_ap"], "ap2")
    assert ask(domain, "ap1", "client", "show", STRANGER)["addresses"] == ["10.77.5.5"]


@pytest.fixture
def watched(domain: Lab) -> Iterator[subprocess.Popen[str]]:
    argv = [programs.path("apctl"), "watch", "--flows", "-o", "jsonl"]
    with domain.popen("ap3", argv, stdout=subprocess.PIPE, text=True) as watch:
        yield watch
        watch.terminate()


def test_watch_reports_roams_and_flows_as_they_happen(
    domain: Lab, watched: subprocess.Popen[str]
) -> None:
    # It takes a while until it listens; until then there is nothing to see of it.
    assert watched.stdout is not None
    for ap in ("ap2", "ap1") * 20:
        domain.roam("client1", ap)
        served_by(domain, "client1", ap)
        if _readable(watched):
            break
    event = json.loads(watched.stdout.readline())
    assert event.keys() >= {"time", "kind", "text", "fields"}
    assert event["kind"] == "roam"
    assert event["fields"]["client"] == mac(domain, "client1")
    assert (event["fields"]["from"], event["fields"]["to"]) in (("ap1", "ap2"), ("ap2", "ap1"))
    with connection(domain, "client1"):
        opened = next(e for e in map(json.loads, watched.stdout) if e["kind"] == "flow-opened")
    assert opened["fields"]["client"] == address(domain, "client1")


def _readable(process: subprocess.Popen[str]) -> bool:
    assert process.stdout is not None
    return bool(select.select([process.stdout], [], [], 0.1)[0])


def test_exit_codes(domain: Lab) -> None:
    unreachable = apctl(domain, "ap1", "--socket", "/nowhere/apagent.sock", "status")
    assert (unreachable.returncode, unreachable.stdout) == (3, "")
    assert "/nowhere/apagent.sock" in unreachable.stderr
    unknown = apctl(domain, "ap1", "client", "show", "02:00:00:00:66:66")
    assert (unknown.returncode, unknown.stdout) == (5, "")
    assert "02:00:00:00:66:66" in unknown.stderr
    assert apctl(domain, "ap1", "client", "show", "nonsense").returncode == 2
    assert apctl(domain, "ap1", "flows", "--anchor", "ap9").returncode == 2


def test_status_is_degraded_while_a_peer_is_down(domain: Lab) -> None:
    assert apctl(domain, "ap1", "status").returncode == 0
    domain.kill_agent("ap3")
    becomes(lambda: len(ask(domain, "ap1", "status")["degraded"]), 1)
    degraded = apctl(domain, "ap1", "status")
    assert degraded.returncode == 4
    assert "ap3" in degraded.stdout
    domain.start_agent("ap3")
    becomes(lambda: ask(domain, "ap1", "status")["degraded"], [], 15.0)
    assert apctl(domain, "ap1", "status").returncode == 0
