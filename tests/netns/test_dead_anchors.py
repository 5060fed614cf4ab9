"""An anchor dies, drains or loses its uplink under real traffic."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import pytest

from apagent.lab.faults import Faults, Way
from apagent.lab.lab import Lab
from apagent.lab.measure import Arrivals, Echoes
from apagent.lab.traffic.running import Running, running, serving
from tests.netns.conftest import MakeLab
from tests.netns.observe import SERVER, agreed, ask, becomes, eventually, served_by, uplink

pytestmark = pytest.mark.netns

START_S, END_S = 10.0, 40.0
CLIENT = "client1"
NOTE = Callable[[str, object], None]
NOTICE_MS = 1500
"""It takes 0.3 to 0.4 s; the machine may be busy."""
SUCCESSION_S = 3.0
"""Far above what a succession takes here (under a second): the machine may be busy."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a client does: a download, an interactive session, and a UDP echo."""

    download: Running
    lines: Running
    echo: Running


@contextmanager
def traffic(lab: Lab, *, stall_s: float = 8.0, rate: int = 100) -> Iterator[Traffic]:
    """All of it, started and known to every AP."""
    options = ("--size", 15_000_000, "--rate-mbit", 12, "--stall-s", stall_s)
    lines = ("--count", 400, "--interval-ms", 25, "--stall-s", stall_s)
    with ExitStack() as stack:
        stack.enter_context(serving(lab))

        def run(*argv: object) -> Running:
            return stack.enter_context(running(lab, CLIENT, *map(str, argv)))

        made = Traffic(
            run("download", SERVER, *options),
            run("lines", SERVER, *lines),
            run("echo", SERVER, "--rate", rate, "--duration-s", 60),
        )
        made.download.wait_for("arrivals", START_S)
        made.lines.wait_for("line", START_S)
        made.echo.wait_for("started", START_S)
        becomes(lambda: len(ask(lab, lab.aps[-1], "flows")), 3)
        yield made


def nat(lab: Lab, ap: str) -> str:
    return str(lab.plan.nat_address(ap))


def holders(lab: Lab, ap: str) -> list[str]:
    """The APs that have the NAT address of an AP on their uplinks, as their kernels say."""
    return [
        other
        for other in lab.aps
        if nat(lab, ap) in lab.run(other, ["ip", "-4", "address", "show", "dev", "wan"]).stdout
    ]


def heir(lab: Lab, ap: str) -> str:
    """Who holds the address of a dead AP: waits until somebody else does."""
    return eventually(lambda: [o for o in holders(lab, ap) if o != ap], SUCCESSION_S)[0]


def sources(echo: Running) -> list[str]:
    """The addresses that the server saw, one after the other."""
    return [source.partition(":")[0] for source in echo.result(END_S)["sources"]]


def whole_download(made: Traffic) -> None:
    result = made.download.result(END_S)
    assert (result["completed"], result["sha256_match"]) == (True, True), result


def domain(make: MakeLab, successor: str = "", lines: str = "") -> Lab:
    """Three APs whose NAT addresses can move, each with its own; `lines` are of ap1's network."""
    lines += f'successor = "{successor}"\n' if successor else ""
    options = {"ap1": lines} if lines else None
    lab = make(aps=3, clients=1, takeover=True, options=options)
    for ap in lab.aps:
        assert holders(lab, ap) == [ap]
    return lab


@pytest.mark.parametrize("successor", ["ap2", "ap3"], ids=["serving", "third"])
def test_flows_survive_the_death_of_their_anchor(
    lab: MakeLab, successor: str, record_property: NOTE
) -> None:
    made = domain(lab, successor)
    with traffic(made) as flows:
        assert flows.download.wait_for("connected", START_S)["address"] == nat(made, "ap1")
        made.roam(CLIENT, "ap2")
        served_by(made, CLIENT, "ap2")
        agreed(made)
        died_ns = Faults(made).power_off("ap1")
        assert heir(made, "ap1") == successor
        taken_ns = time.monotonic_ns()
        back_ns = eventually(lambda: _arrival_after(flows.download, taken_ns), 10)
        whole_download(flows)
        assert flows.lines.result(END_S)["completed"]
        flows.echo.stop()
        seen = sources(flows.echo)
    silence_ms = Arrivals.of(flows.download.events).longest_silence_ns(died_ns, back_ns) / 1e6
    record_property("interruption_ms", round(silence_ms, 1))
    assert seen == [nat(made, "ap1")]
    assert silence_ms < SUCCESSION_S * 1000


def _arrival_after(program: Running, time_ns: int) -> int | None:
    times = Arrivals.of(program.events).times_ns
    return times[-1] if times and times[-1] > time_ns else None


def test_a_former_owner_does_not_steal_and_gets_its_address_and_flows_back_on_command(
    lab: MakeLab,
) -> None:
    made = domain(lab, "ap2")
    faults = Faults(made)
    with traffic(made) as flows:
        made.roam(CLIENT, "ap3")
        served_by(made, CLIENT, "ap3")
        agreed(made)
        faults.power_off("ap1")
        assert heir(made, "ap1") == "ap2"
        faults.power_on("ap1")
        time.sleep(1.5)
        assert holders(made, "ap1") == ["ap2"]
        (anchor,) = ask(made, "ap1", "status")["anchors"]
        assert (anchor["translates_to"], anchor["holds"]) == ("masquerade", [])
        made.run("ap1", ["apctl", "reclaim"])
        becomes(lambda: holders(made, "ap1"), ["ap1"])
        whole_download(flows)
        assert flows.lines.result(END_S)["completed"]
        assert {f["anchor"] for f in ask(made, "ap3", "flows") if f["protocol"] == "udp"} == {"ap1"}


def test_without_takeover_the_flows_of_a_dead_anchor_fail_fast(lab: MakeLab) -> None:
    made = lab(aps=3, clients=1)
    with traffic(made, stall_s=20.0) as flows:
        made.roam(CLIENT, "ap2")
        served_by(made, CLIENT, "ap2")
        agreed(made)
        died = time.monotonic()
        Faults(made).power_off("ap1")
        ended = flows.download.result(END_S)
        took_s = time.monotonic() - died
        assert not ended["completed"]
        assert "reset" in ended["reason"].lower(), ended
        assert took_s < 10.0  # it only listens; it would wait for its stall limit of 20 s
        assert "reset" in flows.lines.result(END_S)["reason"].lower()
        time.sleep(1.0)
        flows.echo.stop()
        seen = sources(flows.echo)
    assert seen == [uplink("ap1"), uplink("ap2")]


def test_a_drained_ap_hands_its_flows_over_without_loss(
    lab: MakeLab, record_property: NOTE
) -> None:
    made = domain(lab, "ap3")
    with traffic(made, rate=1000) as flows:
        made.roam(CLIENT, "ap2")
        served_by(made, CLIENT, "ap2")
        agreed(made)
        began_ns = time.monotonic_ns()
        drained = made.run("ap1", ["apctl", "drain", "ap1", "--wait", "--timeout", "10"])
        assert "draining" in drained.stdout
        ended_ns = time.monotonic_ns()
        assert holders(made, "ap1") == ["ap3"]
        Faults(made).power_off("ap1")
        whole_download(flows)
        assert flows.lines.result(END_S)["completed"]
        flows.echo.stop()
        seen = sources(flows.echo)
    lost = Echoes.of(flows.echo.events).lost(began_ns, ended_ns)
    record_property("echoes_lost_by_the_drain", lost)
    assert seen == [nat(made, "ap1")]
    assert lost <= 20


def test_while_an_ap_drains_its_clients_new_flows_open_elsewhere_and_then_here_again(
    lab: MakeLab,
) -> None:
    made = domain(lab)
    made.run("ap1", ["apctl", "drain"])
    with serving(made):
        for drained in (True, False):
            with running(made, CLIENT, "lines", SERVER, "--count", 20) as lines:
                seen = lines.wait_for("connected", START_S)["address"]
                assert lines.result(END_S)["completed"]
            elsewhere = {nat(made, "ap2"), nat(made, "ap3")}
            assert (seen in elsewhere) is drained, seen
            made.run("ap1", ["apctl", "undrain"])


def test_an_uplink_that_is_unplugged_moves_its_flows(lab: MakeLab) -> None:
    made = domain(lab, "ap3")
    faults = Faults(made)
    with traffic(made) as flows:
        faults.unplug_uplink("ap1")
        assert heir(made, "ap1") == "ap3"
        whole_download(flows)
        assert flows.lines.result(END_S)["completed"]
        with running(made, CLIENT, "lines", SERVER, "--count", 20) as lines:
            assert lines.wait_for("connected", START_S)["address"] != nat(made, "ap1")
            assert lines.result(END_S)["completed"]
        (anchor,) = ask(made, "ap1", "status")["anchors"]
        assert anchor["mode"] == "no-uplink"
        faults.plug_uplink("ap1")
        becomes(lambda: ask(made, "ap1", "status")["anchors"][0]["mode"], "active", 10)


def test_a_tunnel_that_is_cut_leaves_the_address_where_it_answers(lab: MakeLab) -> None:
    made = domain(lab)
    faults = Faults(made)
    faults.isolate("ap1", Way.TUNNEL)
    for ap in ("ap2", "ap3"):
        becomes(partial(_peer, made, ap, "ap1", "tunnel"), "dead")
        assert _peer(made, ap, "ap1", "state") == "in-sync"
    time.sleep(SUCCESSION_S)
    assert holders(made, "ap1") == ["ap1"]
    faults.heal()
    for ap in ("ap2", "ap3"):
        becomes(partial(_peer, made, ap, "ap1", "tunnel"), "alive")
    assert holders(made, "ap1") == ["ap1"]


def test_a_split_brain_ends_with_one_owner_that_answers(lab: MakeLab) -> None:
    made = domain(lab, "ap2")
    faults = Faults(made)
    with traffic(made) as flows:
        made.roam(CLIENT, "ap3")
        served_by(made, CLIENT, "ap3")
        agreed(made)
        # Its switch dies: neither the others nor the segment hear of ap1, which goes on.
        faults.unplug_uplink("ap1")
        faults.isolate("ap1", Way.BACKHAUL)
        becomes(lambda: "ap2" in holders(made, "ap1"), wanted=True)
        # The segment comes back first, so nobody can tell ap1 what has happened.
        faults.plug_uplink("ap1")
        for _ in range(30):
            assert holders(made, "ap1") == ["ap2"]
            time.sleep(0.1)
        faults.heal()
        becomes(lambda: _peer(made, "ap1", "ap2", "state"), "in-sync", 20)
        assert holders(made, "ap1") == ["ap2"]
        whole_download(flows)
        assert flows.lines.result(END_S)["completed"]


def test_a_split_brain_with_two_owners_ends_as_soon_as_they_hear_each_other(
    lab: MakeLab,
) -> None:
    made = domain(lab, "ap2")
    faults = Faults(made)
    # ap1 is alone on its side of both networks, and sees no reason to doubt its uplink.
    faults.block_uplink("ap1")
    faults.isolate("ap1", Way.BACKHAUL)
    becomes(lambda: holders(made, "ap1"), ["ap1", "ap2"])
    # The segment comes back, the control network doesn't.
    faults.unblock_uplink("ap1")
    becomes(lambda: holders(made, "ap1"), ["ap2"])
    faults.heal()
    becomes(lambda: _peer(made, "ap1", "ap2", "state"), "in-sync", 20)
    assert holders(made, "ap1") == ["ap2"]


def test_an_uplink_that_leads_nowhere_counts_as_dead_where_hosts_are_probed(lab: MakeLab) -> None:
    probes = 'uplink_probes = ["203.0.113.1"]\n'
    made = domain(lab, "ap3", probes)
    faults = Faults(made)
    with traffic(made) as flows:
        assert flows.download.wait_for("connected", START_S)["address"] == nat(made, "ap1")
        faults.block_uplink("ap1")
        eventually(lambda: [o for o in holders(made, "ap1") if o != "ap1"], 8.0)
        whole_download(flows)
        assert flows.lines.result(END_S)["completed"]
        (anchor,) = ask(made, "ap1", "status")["anchors"]
        assert anchor["mode"] == "no-uplink"
        assert "203.0.113.1" in anchor["trouble"]
        faults.unblock_uplink("ap1")
        becomes(lambda: ask(made, "ap1", "status")["anchors"][0]["mode"], "active", 10)


def test_a_dead_anchor_is_noticed_and_shown(lab: MakeLab, record_property: NOTE) -> None:
    made = lab(aps=3, clients=0)
    faults = Faults(made)
    assert _peer(made, "ap2", "ap1", "tunnel") == "alive"
    made.kill_agent("ap1")
    time.sleep(1.5)
    assert _peer(made, "ap2", "ap1", "tunnel") == "alive"  # its kernel forwards
    with ThreadPoolExecutor(1) as watcher:
        dead = watcher.submit(_when_dead, made)
        died_ns = faults.power_off("ap1")
        noticed_ms = (dead.result() - died_ns) / 1e6
    record_property("noticed_after_ms", round(noticed_ms))
    assert noticed_ms < NOTICE_MS
    faults.power_on("ap1")
    becomes(lambda: _peer(made, "ap2", "ap1", "tunnel"), "alive")


def _when_dead(lab: Lab) -> int:
    becomes(lambda: _peer(lab, "ap2", "ap1", "tunnel"), "dead")
    return time.monotonic_ns()


def _peer(lab: Lab, ap: str, peer: str, field: str) -> object:
    return next(p[field] for p in ask(lab, ap, "peers") if p["id"] == peer)
