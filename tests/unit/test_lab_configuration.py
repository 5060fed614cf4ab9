"""The configuration files that a lab writes for its agents."""

from pathlib import Path

import pytest

from apagent.config import load
from apagent.lab.agents import configuration
from apagent.lab.place import Place
from apagent.lab.plan import plan


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place("t-", tmp_path)


def test_the_configuration_is_one_that_the_agent_takes(place: Place, tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    file.write_text(configuration(place, plan(3, 0), "ap2"))
    config = load(file)
    assert config.ap == "ap2"
    assert str(config.listen) == "10.99.0.2:7411"
    assert str(config.tunnel.underlay) == "10.99.0.2"
    assert [(p.id, str(p.address), str(p.underlay)) for p in config.peers] == [
        ("ap1", "10.99.0.1:7411", "10.99.0.1"),
        ("ap3", "10.99.0.3:7411", "10.99.0.3"),
    ]
    (lan,) = config.networks
    assert (lan.name, lan.client_interface, lan.uplink) == ("lan", "br-lan", "wan")
    assert config.socket == tmp_path / "ap2" / "control.sock"


def test_the_lines_of_a_lone_ap_are_valid_too(place: Place, tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    file.write_text(configuration(place, plan(1, 0), "ap1"))
    assert load(file).peers == ()


def test_more_networks_and_options_for_the_first(place: Place, tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    options = 'isolate_clients = true\n[[networks.forwards]]\nport = 80\nclient = "10.77.1.1"\n'
    file.write_text(configuration(place, plan(2, 2, networks=2), "ap1", options))
    lan, guest = load(file).networks
    assert (lan.isolate_clients, [f.port for f in lan.forwards]) == (True, [80])
    assert (guest.name, guest.isolate_clients, guest.forwards) == ("guest", False, ())
