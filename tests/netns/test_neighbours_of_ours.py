"""What is not ours on an AP stays as it is: before, during and after apagent."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from apagent.lab import programs
from apagent.lab.lab import Lab
from apagent.lab.traffic.running import running, serving
from tests.netns.conftest import MakeLab
from tests.netns.observe import SERVER, agreed, becomes, served_by, sessions, uplink

pytestmark = pytest.mark.netns

START_S = 10.0
END_S = 30.0
INCLUDE = Path(__file__).parents[2] / "deploy/openwrt/chain-pre/forward/10-apagent.nft"

FIREWALL = f"""
table inet fw4 {{
    set blocked {{ type ipv4_addr; elements = {{ 192.0.2.66 }} }}
    chain input {{
        type filter hook input priority filter; policy accept;
        ip saddr @blocked drop
    }}
    chain forward {{
        type filter hook forward priority filter; policy drop;
        include "{INCLUDE}"
        ct state vmap {{ established : accept, related : accept }}
        iifname "br-lan" oifname "wan" accept
    }}
    chain mangle_forward {{
        type filter hook forward priority mangle; policy accept;
        oifname "wan" tcp flags syn tcp option maxseg size set rt mtu
    }}
    chain srcnat {{
        type nat hook postrouting priority srcnat; policy accept;
        oifname "wan" masquerade
    }}
}}
table ip mwan3 {{
    chain prerouting {{
        type filter hook prerouting priority mangle; policy accept;
        iifname "br-lan" meta mark & 0x00003f00 == 0 meta mark set meta mark | 0x00000100
    }}
}}
"""
COMMANDS = """
ip address add 192.0.2.9/32 dev wan
ip address add 10.77.0.3/16 dev br-lan
ip route add 192.0.2.128/25 via 203.0.113.1 proto static metric 20
ip route add default via 203.0.113.1 table 1
ip route add 10.77.0.0/16 dev br-lan table 1
ip route add 192.0.2.64/26 via 203.0.113.1 table 77500 proto 176
ip rule add priority 700 from 192.0.2.7 lookup 1
ip rule add priority 700 fwmark 0x1000000/0xff000000 iif lo lookup 1
ip rule add priority 1001 iif wan lookup main
ip rule add priority 2001 fwmark 0x100/0x3f00 lookup 1
ip neigh add 10.77.9.9 lladdr 02:00:00:00:09:09 dev br-lan nud permanent
ip neigh add 203.0.113.99 lladdr 02:00:00:00:09:99 dev wan nud permanent
bridge fdb add 02:00:00:00:09:09 dev wlan0 master static
"""
"""Addresses, routes (one with our protocol), rules (one at our priority)."""

EVERYTHING = {
    "ruleset": "nft --stateless list ruleset",
    "rules": "ip rule",
    "routes": "ip route show table all",
    "links": "ip -o link",
    "addresses": "ip -o address",
    "neighbours": "ip -4 neigh show nud permanent",
    "fdb": "bridge fdb show br br-lan",
}
OURS = ("proto 176 ", "apv-lan", "lookup 77")
"""What marks a line of ours; a foreign rule or route is told apart by the rest of it."""


@pytest.fixture
def crowded(lab: MakeLab) -> Iterator[Lab]:
    """A lab whose APs have a firewall and a policy router, and no agent yet."""
    made = lab(aps=2, clients=1, agents=False)
    for ap in made.aps:
        made.run(ap, ["nft", "delete table inet lab_nat"])
        made.run(ap, ["nft", FIREWALL])
        for line in COMMANDS.strip().splitlines():
            made.run(ap, line.split())
    with made.watch_for_leaks() as leaks:
        yield made
        assert leaks.packets() == []


def look(lab: Lab, ap: str) -> dict[str, list[str]]:
    seen = {
        name: [line.rstrip() for line in lab.run(ap, command.split()).stdout.splitlines()]
        for name, command in EVERYTHING.items()
    }
    # What the bridge learns comes and goes by itself.
    seen["fdb"] = [line for line in seen["fdb"] if line.endswith(("static", "permanent"))]
    return seen


def without_ours(seen: dict[str, list[str]]) -> dict[str, list[str]]:
    """The foreign part, in the kernel's order."""
    foreign = {name: [line for line in lines if not _is_ours(line)] for name, lines in seen.items()}
    foreign["ruleset"] = _without_our_table(seen["ruleset"])
    return foreign


def _is_ours(line: str) -> bool:
    return any(mark in line + " " for mark in OURS) and "table 77500" not in line


def _without_our_table(ruleset: list[str]) -> list[str]:
    first = next(
        (i for i, line in enumerate(ruleset) if line.startswith("table inet apagent")), None
    )
    if first is None:
        return ruleset
    behind = ruleset.index("}", first) + 1
    return ruleset[:first] + ruleset[behind:]


def start_agents(lab: Lab) -> None:
    for ap in lab.aps:
        lab.agents.prepare(ap)
        lab.agents.start(ap)
    lab.agents.wait_ready(lab.aps)


def cleanup(lab: Lab, ap: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
    config = str(lab.agents.config_file(ap))
    return lab.run(ap, [programs.path("apagent"), "cleanup", "--config", config], check=check)


def test_foreign_objects_stay_and_cleanup_restores_all(crowded: Lab) -> None:
    before = {ap: look(crowded, ap) for ap in crowded.aps}
    start_agents(crowded)
    roam_with_traffic(crowded, "ap2")
    during = {ap: look(crowded, ap) for ap in crowded.aps}
    for ap in crowded.aps:
        assert without_ours(during[ap]) == without_ours(before[ap])
        assert len(during[ap]["rules"]) > len(before[ap]["rules"])

    refused = cleanup(crowded, "ap1", check=False)
    assert refused.returncode == 1
    assert look(crowded, "ap1")["rules"] == during["ap1"]["rules"]

    for ap in crowded.aps:
        crowded.kill_agent(ap)
        said = cleanup(crowded, ap).stdout
        assert all(line.startswith("removed ") for line in said.splitlines())
        for thing in ("table", "policy rule", "route", "VXLAN device apv-lan"):
            assert thing in said
        assert look(crowded, ap) == before[ap]
        assert cleanup(crowded, ap).stdout == "nothing of ours is installed\n"


def roam_with_traffic(lab: Lab, ap: str) -> None:
    """A download over a roam, by which every kind of object of ours gets installed."""
    options = ("--size", 3_000_000, "--rate-mbit", 20)
    with serving(lab), running(lab, "client1", "download", SERVER, *options) as download:
        assert download.wait_for("connected", START_S)["address"] == uplink("ap1")
        becomes(lambda: len(sessions(lab, ap)) >= 1, True)
        agreed(lab)
        lab.roam("client1", ap)
        served_by(lab, "client1", ap)
        result = download.result(END_S)
        assert (result["completed"], result["sha256_match"]) == (True, True), result


def test_our_table_outlives_a_flush_by_others(crowded: Lab) -> None:
    start_agents(crowded)
    options = ("--size", 6_000_000, "--rate-mbit", 20)
    with serving(crowded), running(crowded, "client1", "download", SERVER, *options) as download:
        assert download.wait_for("connected", START_S)["address"] == uplink("ap1")
        becomes(lambda: len(sessions(crowded, "ap2")) >= 1, True)
        agreed(crowded)
        for ap in crowded.aps:
            crowded.run(ap, ["nft", "flush ruleset"])
            assert crowded.run(ap, ["nft", "list tables"]).stdout == "table inet apagent\n"
        crowded.roam("client1", "ap2")
        served_by(crowded, "client1", "ap2")
        result = download.result(END_S)
        assert (result["completed"], result["sha256_match"]) == (True, True), result
