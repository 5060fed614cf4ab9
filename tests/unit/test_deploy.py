"""What is installed on an access point: the rendering of UCI, the scripts, the systemd unit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from apagent import config
from apagent.errors import ConfigError

DEPLOY = Path(__file__).parents[2] / "deploy"
OPENWRT = DEPLOY / "openwrt"

FUNCTIONS_SH = """
config_load() {
    [ "$1" = apagent ] || return 1
    [ -f "$UCI_FILE" ] || return 1
    . "$UCI_FILE"
    config_cb
}
config() { config_cb "$1" "$2"; }
option() { local name="$1"; shift; option_cb "$name" "$*"; }
list() { local name="$1"; shift; list_cb "$name" "$*"; }
"""
"""What uci2toml uses of OpenWrt's functions.sh; a UCI file is a shell script of these calls."""


def render(tmp_path: Path, uci: str) -> str:
    functions, file = tmp_path / "functions.sh", tmp_path / "apagent"
    functions.write_text(FUNCTIONS_SH)
    file.write_text(uci)
    done = subprocess.run(
        ["dash", OPENWRT / "uci2toml"],
        env=os.environ | {"FUNCTIONS": str(functions), "UCI_FILE": str(file)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout


def test_the_uci_example_renders_to_a_valid_configuration(tmp_path: Path) -> None:
    checked = config.parse(render(tmp_path, (OPENWRT / "apagent.config").read_text()))
    assert checked.ap == "ap1"
    assert [peer.id for peer in checked.peers] == ["ap2"]
    assert [(n.name, n.vni, n.uplink) for n in checked.networks] == [("lan", 77, "wan")]
    assert checked.socket == Path("/var/run/apagent/control.sock")


def test_numbers_stay_numbers_and_names_stay_text(tmp_path: Path) -> None:
    uci = """
config ap 'ap'
\toption id '7'
config tunnel
\toption mtu '1400'
config peering
\toption sync_timeout_s '2.5'
config kernel
\toption mark_mask '0xff0000'
config peer
\toption id 'one'
config peer
\toption id 'two'
"""
    assert tomllib.loads(render(tmp_path, uci)) == {
        "ap": {"id": "7"},
        "tunnel": {"mtu": 1400},
        "peering": {"sync_timeout_s": 2.5},
        "kernel": {"mark_mask": 0xFF0000},
        "peers": [{"id": "one"}, {"id": "two"}],
    }


@pytest.mark.parametrize(
    ("uci_value", "value"),
    [
        ("'a\"b\\c'", 'a"b\\c'),
        ("'two words'", "two words"),
        ("''", ""),
        ("'$(id) `id`'", "$(id) `id`"),
    ],
)
def test_text_is_escaped(tmp_path: Path, uci_value: str, value: str) -> None:
    rendered = render(tmp_path, f"config ap\n\toption id {uci_value}\n")
    assert tomllib.loads(rendered) == {"ap": {"id": value}}


def test_what_is_no_number_reaches_the_check_as_text(tmp_path: Path) -> None:
    rendered = render(tmp_path, "config tunnel\n\toption port 'many'\n")
    assert tomllib.loads(rendered) == {"tunnel": {"port": "many"}}


def test_a_misspelt_option_reaches_the_check(tmp_path: Path) -> None:
    uci = (OPENWRT / "apagent.config").read_text().replace("option vni", "option vnii")
    with pytest.raises(ConfigError, match="networks"):
        config.parse(render(tmp_path, uci))


def test_a_forward_belongs_to_the_network_above_it(tmp_path: Path) -> None:
    uci = (OPENWRT / "apagent.config").read_text().replace("config log 'log'", "config other")
    uci = uci.partition("config other")[0]
    uci += "\toption isolate_clients '1'\nconfig forward\n\toption port '8080'\n"
    uci += "\toption client '10.77.0.20'\n\toption client_port '80'\n"
    network = config.parse(render(tmp_path, uci)).networks[-1]
    assert network.isolate_clients
    assert [(f.port, str(f.client), f.client_port) for f in network.forwards] == [
        (8080, "10.77.0.20", 80)
    ]


def test_the_systemd_example_is_a_valid_configuration() -> None:
    checked = config.load(DEPLOY / "systemd" / "agent.toml.example")
    assert [peer.id for peer in checked.peers] == ["ap2"]


def test_the_commented_defaults_of_the_example_are_the_defaults() -> None:
    text = (DEPLOY / "systemd" / "agent.toml.example").read_text()
    defaults = re.sub(r"(?m)^# \[\[networks\.forwards\]\]\n(# .*\n)+", "", text)
    with_all = re.sub(r"^# (\[[a-z]+\]|[a-z_]+ = )", r"\1", defaults, flags=re.MULTILINE)
    derived = re.compile(r"^((?:tunnel_)?address = \"100|mtu = )", re.MULTILINE)
    with_all = derived.sub(r"# \1", with_all)
    assert with_all != defaults
    assert config.parse(with_all) == config.parse(text)


@pytest.mark.parametrize("name", ["uci2toml", "apagent.init"])
def test_scripts_parse(name: str) -> None:
    subprocess.run(["dash", "-n", OPENWRT / name], check=True)


def test_the_init_script_calls_only_what_procd_has(tmp_path: Path) -> None:
    """Run `start_service` with stubs that write down how they were called."""
    calls = start_service(tmp_path, enabled="1")
    assert calls[0].startswith("check-config ")
    assert "procd_set_param command /usr/bin/apagent run --config" in " ".join(calls)
    assert calls[-1] == "procd_close_instance"


@pytest.mark.parametrize(("verdict", "starts"), [(4, True), (1, False)])
def test_the_init_script_waits_for_interfaces_but_not_with_a_wrong_configuration(
    tmp_path: Path, verdict: int, starts: bool
) -> None:
    calls = start_service(tmp_path, enabled="1", verdict=verdict)
    assert ("procd_open_instance" in calls) is starts


def test_the_init_script_does_nothing_when_switched_off(tmp_path: Path) -> None:
    assert start_service(tmp_path, enabled="0") == []


def start_service(tmp_path: Path, enabled: str, verdict: int = 0) -> list[str]:
    """`verdict` is what `check-config` exits with."""
    log = tmp_path / "calls"
    log.touch()
    agent = tmp_path / "agent"
    agent.write_text(f'#!/bin/sh\necho "$@" >>{log}\nexit {verdict}\n')
    render_stub = tmp_path / "render"
    render_stub.write_text("#!/bin/sh\necho '[ap]'\n")
    for program in (agent, render_stub):
        program.chmod(0o755)
    text = (OPENWRT / "apagent.init").read_text()
    text = text.replace("PROG=/usr/bin/apagent", f"PROG={agent}")
    text = text.replace("/usr/lib/apagent/uci2toml", str(render_stub))
    text = text.replace("/var/", f"{tmp_path}/")
    stubs = "\n".join(
        f'{name}() {{ echo "{name} $*" | sed "s/ $//" >>{log}; }}'
        for name in ("procd_open_instance", "procd_set_param", "procd_close_instance")
    )
    script = f"""
config_load() {{ :; }}
config_get_bool() {{ eval "$1={enabled}"; }}
{stubs}
{text}
start_service
"""
    subprocess.run(["dash", "-c", script], check=verdict != 1, capture_output=True)
    return [line.replace(str(agent), "/usr/bin/apagent") for line in log.read_text().splitlines()]


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    assert unit()["Service"]["ExecStart"] == (
        "/usr/bin/apagent run --config /etc/apagent/agent.toml"
    )
    if shutil.which("systemd-analyze") is None:
        return
    checked = tmp_path / "apagent.service"
    text = (DEPLOY / "systemd" / "apagent.service").read_text()
    checked.write_text(text.replace("/usr/bin/apagent", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", checked],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_leaves_forwarding_alone_and_sysctls_writable() -> None:
    service = unit()["Service"]
    assert service["Type"] == "notify"
    assert service["Restart"] == "always"
    assert unit()["Unit"]["StartLimitIntervalSec"] == "0"
    assert int(service["WatchdogSec"]) > 0
    assert "ExecStopPost" not in service
    assert "ExecStop" not in service
    assert service.get("ProtectKernelTunables", "no") == "no"
    assert "CAP_NET_ADMIN" in service["CapabilityBoundingSet"].split()
    assert "AF_NETLINK" in service["RestrictAddressFamilies"].split()


def unit() -> dict[str, dict[str, Any]]:
    sections: dict[str, dict[str, Any]] = {}
    for line in (DEPLOY / "systemd" / "apagent.service").read_text().splitlines():
        if line.startswith("["):
            current = sections.setdefault(line.strip("[]"), {})
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            current[key] = value
    return sections
