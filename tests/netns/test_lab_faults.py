"""The lab's faults do what they say, to whom they say."""

from __future__ import annotations

import pytest

from apagent.lab.faults import Faults, Way
from apagent.lab.lab import Lab
from tests.netns.conftest import MakeLab

pytestmark = pytest.mark.netns


def reaches(lab: Lab, ap: str, other: str) -> bool:
    address = str(lab.plan.underlay(other))
    ping = ["ping", "-c", "3", "-i", "0.3", "-W", "1", "-q", address]
    return lab.run(ap, ping, check=False).returncode == 0


def subscribes(lab: Lab, ap: str, other: str) -> bool:
    address = str(lab.plan.underlay(other))
    probe = ["timeout", "1", "bash", "-c", f"</dev/tcp/{address}/7411"]
    return lab.run(ap, probe, check=False).returncode == 0


def test_each_way_is_cut_alone_and_heals(lab: MakeLab) -> None:
    made = lab(aps=3, clients=0)
    faults = Faults(made)
    faults.part("ap1", "ap2", Way.CONTROL)
    assert reaches(made, "ap1", "ap2")
    assert not subscribes(made, "ap1", "ap2")
    assert subscribes(made, "ap1", "ap3")
    faults.isolate("ap3", Way.BACKHAUL)
    assert not reaches(made, "ap1", "ap3")
    assert not reaches(made, "ap3", "ap2")
    faults.heal()
    for one, two in (("ap1", "ap2"), ("ap1", "ap3"), ("ap2", "ap3")):
        assert reaches(made, one, two)
        assert subscribes(made, two, one)


def test_an_ap_loses_its_power_and_boots(lab: MakeLab) -> None:
    made = lab(aps=2, clients=1)
    faults = Faults(made)
    faults.power_off("ap1")
    assert not reaches(made, "ap2", "ap1")
    assert made.agents.process("ap1") is None
    assert "apagent" not in made.run("ap1", ["nft", "list", "tables"]).stdout
    faults.power_on("ap1")
    assert reaches(made, "ap2", "ap1")
    assert made.apctl("ap1", "status")["in_sync"]
    made.run("client1", ["ping", "-c", "3", "-W", "1", "-q", "198.51.100.10"])


def test_cables_are_pulled_one_by_one(lab: MakeLab) -> None:
    made = lab(aps=2, clients=0)
    faults = Faults(made)
    internet = ["ping", "-c", "3", "-W", "1", "-q", "203.0.113.1"]
    faults.unplug_uplink("ap1")
    assert made.run("ap1", internet, check=False).returncode != 0
    assert reaches(made, "ap1", "ap2")
    faults.plug_uplink("ap1")
    faults.unplug_backhaul("ap1")
    assert made.run("ap1", internet, check=False).returncode == 0
    assert not reaches(made, "ap1", "ap2")
    faults.plug_backhaul("ap1")
    assert reaches(made, "ap1", "ap2")
