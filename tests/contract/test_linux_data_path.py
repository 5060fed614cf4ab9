"""What only a real kernel can show: objects that stay the same, objects of others untouched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from apagent.core.model import TCP, Flow, Translation
from apagent.errors import KernelFault
from apagent.kernel import sysctl
from apagent.kernel.conntrack import LinuxFlowMonitor
from apagent.kernel.linux import LinuxDataPath
from apagent.kernel.needs import underlay_mtu
from apagent.kernel.port import Change, NetworkDelta
from tests.contract.conftest import AccessPoint, run, without_time
from tests.contract.test_data_path import arrivals, arrived
from tests.domains import ANN, ANN_IP, AP2, BEN, BEN_IP, LAN, domain, lan, takeover

pytestmark = pytest.mark.netns

DOMAIN = domain()
DEVICE = "apv-lan"

FOREIGN = """
rule add priority 700 from 192.0.2.0/24 lookup 99
rule add priority 700 iif br-lan fwmark 0x1000000/0xff000000 lookup 77001
rule add priority 702 to 10.77.0.0/16 lookup 77000 protocol 99
route add 192.0.2.0/24 via 10.99.0.2
route add 192.0.2.0/24 via 10.99.0.2 table 77000 proto 99
route add 192.0.3.0/24 via 10.99.0.2 table 99 proto 176
address add 192.0.2.1/32 dev br-lan
neighbour add 10.77.9.9 lladdr 02:00:00:00:09:09 dev br-lan nud permanent
neighbour add 10.77.9.8 lladdr 02:00:00:00:09:08 dev br-lan nud permanent protocol 99
link add vx type vxlan id 99 local 10.99.0.1 dstport 4789
link add apv-else type bridge
"""


@pytest.fixture
def path(access_point: AccessPoint) -> Iterator[LinuxDataPath]:
    run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    path = LinuxDataPath()
    yield path
    path.close()


def without_ids(snapshot: dict[str, str]) -> dict[str, str]:
    """A snapshot without the handles of rules, which count on."""
    return snapshot | {"ruleset": without_time(run("nft", "list", "ruleset"))}


def test_preparing_twice_touches_nothing(path: LinuxDataPath, access_point: AccessPoint) -> None:
    path.prepare(DOMAIN)
    path.release_hold()
    path.apply({LAN: arrivals()})
    before = access_point.snapshot()
    assert path.prepare(DOMAIN) == ([], [], False)
    assert access_point.snapshot() == before


def test_a_restarted_agent_touches_nothing(path: LinuxDataPath, access_point: AccessPoint) -> None:
    path.prepare(DOMAIN)
    path.release_hold()
    path.apply({LAN: arrivals()})
    path.close()
    before = access_point.snapshot()
    restarted = LinuxDataPath()
    try:
        restarted.prepare(DOMAIN)
        after = access_point.snapshot()
    finally:
        restarted.close()
    assert after | {"ruleset": ""} == before | {"ruleset": ""}
    for line in before["ruleset"].splitlines():
        if not line.startswith("table"):
            assert line in after["ruleset"]


def test_what_is_not_ours_is_spared(path: LinuxDataPath, access_point: AccessPoint) -> None:
    run("ip", "-batch", "-", stdin=FOREIGN)
    run("nft", "add table inet fw4; add chain inet fw4 c { type filter hook forward priority 0; }")
    before = without_ids(access_point.snapshot())
    path.prepare(DOMAIN)
    path.apply({LAN: arrivals()})
    between = access_point.snapshot()
    for part in ("rules", "routes", "neighbours", "fdb", "links", "tunnels", "addresses"):
        assert set(before[part].splitlines()) <= set(between[part].splitlines()), part
    path.remove(DOMAIN)
    assert without_ids(access_point.snapshot()) == before


def test_a_changed_underlay_makes_the_device_anew(
    path: LinuxDataPath, access_point: AccessPoint
) -> None:
    path.prepare(DOMAIN)
    moved = replace(DOMAIN, me=replace(DOMAIN.me, underlay=IPv4Address("10.99.0.77")))
    path.prepare(moved)
    assert "local 10.99.0.77" in run("ip", "-d", "link", "show", DEVICE)
    assert "default via 100.127.0.2" in run("ip", "route", "show", "table", "77001")


def test_a_changed_mtu_keeps_the_device(path: LinuxDataPath, access_point: AccessPoint) -> None:
    path.prepare(DOMAIN)
    path.apply({LAN: arrivals()})
    run("ip", "link", "set", DEVICE, "address", "02:00:00:00:00:99")
    index = run("ip", "-o", "link", "show", DEVICE).split(":")[0]
    path.prepare(replace(DOMAIN, tunnel_mtu=1400))
    link = run("ip", "-o", "link", "show", DEVICE)
    assert link.split(":")[0] == index
    assert "mtu 1400" in link
    assert DOMAIN.me.tunnel_mac in link
    assert path.read()[LAN].routes == {BEN_IP: AP2}


def test_damage_is_repaired(path: LinuxDataPath, access_point: AccessPoint) -> None:
    path.prepare(DOMAIN)
    path.release_hold()
    before = access_point.snapshot()
    run(
        "ip",
        "-batch",
        "-",
        stdin=f"""
rule del priority 702
rule add priority 700 iif br-lan fwmark 0x9000000/0xff000000 lookup 77009 protocol 176
route del default table 77001
route replace default via 100.127.0.9 dev {DEVICE} onlink table 77002 proto 176
route add 10.77.5.5 via 100.127.0.9 dev {DEVICE} onlink table 77000 proto 176
address add 100.127.0.99/32 dev {DEVICE}
address del 100.127.0.1/32 dev {DEVICE}
neighbour replace 100.127.0.2 lladdr 02:00:00:00:00:98 dev {DEVICE} nud permanent
neighbour add 100.127.0.98 lladdr 02:00:00:00:00:98 dev {DEVICE} nud permanent
""",
    )
    run("bridge", "fdb", "replace", DOMAIN.peers[0].tunnel_mac, "dev", DEVICE, "dst", "10.99.0.98")
    run("bridge", "fdb", "add", "02:00:00:00:00:98", "dev", DEVICE, "dst", "10.99.0.98")
    run("sysctl", "-q", f"net.ipv4.conf.{DEVICE}.rp_filter=1")
    path.prepare(DOMAIN)
    after = access_point.snapshot()
    assert {part: sorted(text.split("\n")) for part, text in after.items()} == {
        part: sorted(text.split("\n")) for part, text in before.items()
    }
    assert run("sysctl", "-n", f"net.ipv4.conf.{DEVICE}.rp_filter") == "2\n"


def test_tables_of_other_numbers_are_cleared(path: LinuxDataPath) -> None:
    path.prepare(DOMAIN)
    path.prepare(replace(DOMAIN, route_table_base=88000))
    assert "lookup 77" not in run("ip", "rule")
    assert "table 77" not in run("ip", "-4", "route", "show", "table", "all", "proto", "176")


def test_a_device_of_our_name_that_is_not_ours(path: LinuxDataPath) -> None:
    run("ip", "link", "add", DEVICE, "type", "bridge")
    with pytest.raises(KernelFault, match=r"apv-lan exists and is not a VXLAN.*device_prefix"):
        path.prepare(DOMAIN)


def test_a_foreign_device_with_our_vni(path: LinuxDataPath) -> None:
    run("ip", "-batch", "-", stdin="link add vx type vxlan id 77 local 10.99.0.1 dstport 4789")
    with pytest.raises(KernelFault, match=r"apv-lan \(VNI 77.*already exists"):
        path.prepare(DOMAIN)


def test_the_client_interface_goes_and_comes_back(path: LinuxDataPath) -> None:
    zoned = replace(DOMAIN, networks=(replace(lan(), zone=7),))
    path.prepare(zoned)
    assert path.warnings() == []
    run("ip", "link", "del", "br-lan")
    path.apply({LAN: arrivals()})
    assert path.prepare(zoned) == ([], [], False)
    without = replace(arrived(), neighbours={})
    assert path.read()[LAN] == without
    [warning] = path.warnings()
    assert warning.startswith("interface br-lan is gone (networks[0].client_interface)")
    run("ip", "-batch", "-", stdin="link add br-lan type bridge\nlink set br-lan up")
    [warning] = path.warnings()
    assert warning.startswith("br-lan has lost the gateway's address 10.77.0.1")
    run("ip", "address", "add", "10.77.0.1/16", "dev", "br-lan")
    prepared = path.prepare(zoned)
    assert "net.ipv4.conf.br-lan.proxy_arp: 0 -> 1" in prepared.sysctls
    assert len(prepared.objects) == 1
    path.apply({LAN: NetworkDelta(neighbours={ANN_IP: Change(None, ANN)})})
    assert path.read()[LAN] == arrived()
    assert path.warnings() == []
    assert "10.77.0.0/16 dev br-lan" in run("ip", "route", "show", "table", "77000")


def test_a_machine_that_is_no_router_any_more(path: LinuxDataPath) -> None:
    path.prepare(DOMAIN)
    run("sysctl", "-q", "net.ipv4.ip_forward=0")
    [warning] = path.warnings()
    assert warning.startswith("IPv4 forwarding is off")


def test_other_interfaces_and_addresses_that_are_missing(path: LinuxDataPath) -> None:
    path.prepare(DOMAIN)
    run("ip", "link", "set", "wan", "down")
    run("ip", "address", "flush", "dev", "underlay")
    down, lost = path.warnings()
    assert down == "interface wan is down (networks[0].uplink): set it up"
    assert lost.startswith("no interface has the address 10.99.0.1 (tunnel.underlay)")
    run("ip", "link", "del", "wan")
    assert path.warnings()[0].startswith("interface wan is gone (networks[0].uplink)")


def test_what_was_opened_without_a_table_is_opened_again(
    path: LinuxDataPath, access_point: AccessPoint
) -> None:
    """Else it stays untranslated for as long as it is used, and the leak guard drops it."""
    access_point.forward_to_the_internet()
    run("nft", "table inet x { chain c { type filter hook forward priority 0; ct state new ; }; }")
    access_point.send_udp(ANN, ANN_IP)
    assert "src=10.77.1.1" in run("conntrack", "-L", "-f", "ipv4")
    path.prepare(DOMAIN)
    path.release_hold()
    assert "src=10.77.1.1" not in run("conntrack", "-L", "-f", "ipv4")
    access_point.send_udp(ANN, ANN_IP)
    assert "dst=203.0.113.11" in run("conntrack", "-L", "-f", "ipv4")
    assert path.counters().leaked == 0
    path.prepare(DOMAIN)
    assert "dst=203.0.113.11" in run("conntrack", "-L", "-f", "ipv4")


def test_flows_of_addresses_that_move_end_with_the_clean_up(
    path: LinuxDataPath, access_point: AccessPoint
) -> None:
    """Else they would leave with an address that another AP has by then.

    Also those that a port forward has let in.
    """
    access_point.forward_to_the_internet()
    address = IPv4Address("203.0.113.21")
    moving = replace(DOMAIN, networks=(takeover(),))
    path.prepare(moving)
    path.release_hold()
    held = {address: Change(None, True)}
    path.apply({LAN: NetworkDelta(addresses=held, sources={"wan": Change(None, address)})})
    access_point.send_udp(ANN, ANN_IP)
    assert "dst=203.0.113.21" in run("conntrack", "-L", "-f", "ipv4")
    let_in = Flow(TCP, ANN_IP, 80, IPv4Address("198.51.100.10"), 50000).key
    with closing(LinuxFlowMonitor(moving.networks)) as monitor:
        monitor.adopt(LAN, {let_in: Translation(address, 8080).packed}, {let_in})
    assert "dst=203.0.113.21 sport=50000 dport=8080" in run("conntrack", "-L", "-f", "ipv4")
    assert "conntrack entries of 2 flows of addresses that move" in path.remove(moving)
    assert "dst=203.0.113.21" not in run("conntrack", "-L", "-f", "ipv4")


def test_a_full_conntrack_table_is_said(
    path: LinuxDataPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tmp_path / "net/netfilter"
    settings.mkdir(parents=True)
    monkeypatch.setattr(sysctl, "_ROOT", tmp_path)
    for name, value in (("tcp_loose", 1), ("count", 94), ("max", 100)):
        (settings / f"nf_conntrack_{name}").write_text(str(value))
    assert path.warnings() == []
    (settings / "nf_conntrack_count").write_text("95")
    [warning] = path.warnings()
    assert warning.startswith("the conntrack table is full (95 of 100 entries, 0 packets dropped")


def test_a_map_that_others_made_too_small(path: LinuxDataPath) -> None:
    key = "ipv4_addr . ipv4_addr . inet_proto . inet_service . inet_service"
    run("nft", f"table inet apagent {{ map lan_flows {{ type {key} : classid; size 1 ; }}; }}")
    path.prepare(DOMAIN)
    with pytest.raises(KernelFault, match=r"inet apagent lan_flows: .*is full.*apagent cleanup"):
        path.apply({LAN: arrivals()})


def test_sysctls_that_change_are_said(path: LinuxDataPath) -> None:
    run("sysctl", "-q", "net.ipv4.conf.br-lan.rp_filter=1", "net.netfilter.nf_conntrack_events=2")
    assert sorted(path.prepare(DOMAIN).sysctls) == [
        "net.ipv4.conf.br-lan.proxy_arp: 0 -> 1",
        "net.ipv4.conf.br-lan.rp_filter: 1 -> 2",
        "net.ipv4.neigh.br-lan.proxy_delay: 80 -> 10",
        "net.netfilter.nf_conntrack_events: 2 -> 1",
    ]
    assert path.prepare(DOMAIN).sysctls == []


def test_no_proxy_arp_between_isolated_clients(path: LinuxDataPath) -> None:
    path.prepare(replace(DOMAIN, networks=(replace(lan(), isolate_clients=True),)))
    assert run("sysctl", "-n", "net.ipv4.conf.br-lan.proxy_arp") == "0\n"


def test_clients_are_forgotten_on_any_port(path: LinuxDataPath, access_point: AccessPoint) -> None:
    path.prepare(DOMAIN)
    access_point.send_arp(ANN, ANN_IP)
    access_point.send_arp(BEN, BEN_IP, port=1)
    run("bridge", "fdb", "add", "02:00:00:00:00:77", "dev", "port1", "master", "static")
    path.forget_client(LAN, ANN, [])
    path.forget_client(LAN, BEN, [])
    assert ANN not in run("bridge", "fdb") + run("ip", "neighbour")
    assert BEN not in run("bridge", "fdb") + run("ip", "neighbour")
    path.apply({LAN: NetworkDelta(neighbours={ANN_IP: Change(None, ANN)})})
    path.forget_client(LAN, ANN, [])
    assert path.read()[LAN].neighbours == {ANN_IP: ANN}


def test_a_device_that_went_down_is_set_up_again(path: LinuxDataPath) -> None:
    path.prepare(DOMAIN)
    run("ip", "link", "set", DEVICE, "down")
    path.prepare(DOMAIN)
    assert "default via 100.127.0.3" in run("ip", "route", "show", "table", "77002")
    assert "100.127.0.3 lladdr" in run("ip", "neighbour", "show", "dev", DEVICE)


def test_clients_are_forgotten_without_a_bridge(path: LinuxDataPath) -> None:
    plain = replace(DOMAIN, networks=(replace(lan(), client_interface="underlay"),))
    path.prepare(plain)
    run(*f"ip neighbour add {ANN_IP} lladdr {ANN} dev underlay nud stale".split())
    path.forget_client(LAN, ANN, [])
    assert ANN not in run("ip", "neighbour")


def test_a_resolved_neighbour_becomes_ours(path: LinuxDataPath, access_point: AccessPoint) -> None:
    path.prepare(DOMAIN)
    access_point.send_arp(ANN, ANN_IP)
    path.apply({LAN: NetworkDelta(neighbours={ANN_IP: Change(None, ANN)})})
    assert path.read()[LAN].neighbours == {ANN_IP: ANN}


def test_needs_are_named(path: LinuxDataPath) -> None:
    before = run("ip", "link")
    other = replace(lan(), uplink="nowhere", client_interface="br-none")
    run("sysctl", "-q", "net.ipv4.ip_forward=0")
    missing = path.missing_needs(replace(DOMAIN, networks=(other,)))
    assert [line.split(":")[0] for line in missing] == [
        "IPv4 forwarding is off",
        "networks[0].client_interface",
        "networks[0].uplink",
    ]
    assert "br-none" in missing[1]
    run("sysctl", "-q", "net.ipv4.ip_forward=1")
    assert path.missing_needs(DOMAIN) == []
    assert run("ip", "link") == before


def test_the_underlay_says_its_mtu(access_point: AccessPoint) -> None:
    run("ip", "link", "set", "underlay", "mtu", "1480")
    assert underlay_mtu(IPv4Address("10.99.0.1")) == 1480
    with pytest.raises(KernelFault, match=r"^tunnel\.underlay: .*10\.99\.0\.5"):
        underlay_mtu(IPv4Address("10.99.0.5"))


def test_what_others_break_is_said(path: LinuxDataPath) -> None:
    assert path.warnings() == []
    loose = Path("/proc/sys/net/netfilter/nf_conntrack_tcp_loose")
    loose.write_text("0")
    [warning] = path.warnings()
    assert warning.startswith("net.netfilter.nf_conntrack_tcp_loose is 0")
