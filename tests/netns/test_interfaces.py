"""Interfaces of an AP go and come back, as at a restart of its network: all works again at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from apagent.lab.lab import Lab
from apagent.lab.plan import GATEWAY_MAC
from tests.netns.conftest import MakeLab
from tests.netns.nat_support import (
    accepted,
    exchange,
    flows,
    known_everywhere,
    listening,
    ping,
    roam,
    tcp,
)
from tests.netns.observe import (
    SERVER,
    Session,
    address,
    ask,
    becomes,
    eventually,
    mac,
    nearby,
    served_by,
    tracked,
    uplink,
)

pytestmark = pytest.mark.netns

Record = Callable[[str, object], None]
BRIDGE_GONE = "ip link del br-lan"
BRIDGE_BACK = f"""
ip link add br-lan address {GATEWAY_MAC} type bridge
ip link set wlan0 master br-lan
ip address add 10.77.0.1/16 dev br-lan
ip link set br-lan up
"""
UPLINK_AS_BRIDGE = """
ip link set wan down
ip address flush dev wan
ip link set wan name port0
ip link set port0 up
"""
UPLINK_GONE = "ip link del wan"
UPLINK_BACK = """
ip link add wan type bridge
ip link set port0 master wan
ip address add ADDRESS/24 dev wan
ip link set wan up
ip route add default via 203.0.113.1
"""
UPLINK_AS_BEFORE = """
ip link del wan
ip link set port0 down
ip link set port0 name wan
ip address add ADDRESS/24 dev wan
ip link set wan up
ip route add default via 203.0.113.1
"""
NEW_ADDRESS = "203.0.113.77"


@pytest.fixture(scope="module")
def domain(module_lab: MakeLab) -> Lab:
    return module_lab(aps=3, clients=2, networks=2)


@pytest.fixture(autouse=True)
def _at_ap1(domain: Lab) -> None:
    for client in domain.clients:
        roam(domain, client, "ap1")


def script(lab: Lab, ap: str, text: str) -> None:
    lab.run(ap, ["sh", "-ec", text.replace("ADDRESS", uplink(ap))])


def degraded(lab: Lab, ap: str) -> list[str]:
    found: list[str] = ask(lab, ap, "status")["degraded"]
    return found


def new_connection(lab: Lab, client: str) -> str:
    """Open a connection and use it; where it seems to come from."""
    with (
        listening(lab, "server", SERVER) as listener,
        tcp(lab, client, listener.getsockname()) as near,
    ):
        far, (source, _) = accepted(listener)
        with far:
            exchange(near, far)
    return source


def anchored(lab: Lab, anchor: str) -> list[set[Session]]:
    """The connections of an anchor, as every AP knows them."""
    return [flows(lab, ap, "--anchor", anchor, "--protocol", "tcp") for ap in lab.aps]


def neighbour(lab: Lab, client: str) -> str:
    """The permanent entry that its serving AP has for a client."""
    return f"{address(lab, client)} dev br-lan lladdr {mac(lab, client)} PERMANENT proto 176"


def test_a_client_bridge_that_is_made_anew(domain: Lab, record_property: Record) -> None:
    with (
        listening(domain, "server", SERVER) as listener,
        tcp(domain, "client1", listener.getsockname()) as near,
    ):
        far, _ = accepted(listener)
        with far:
            known_everywhere(domain)
            roam(domain, "client1", "ap2")
            exchange(near, far)
            script(domain, "ap2", BRIDGE_GONE)
            assert degraded(domain, "ap2")[0].startswith("interface br-lan is gone")
            # The other network of this AP goes on, and so do changes of its clients.
            roam(domain, "client2", "ap2")
            assert new_connection(domain, "client2") == uplink("ap2")
            script(domain, "ap2", BRIDGE_BACK)
            began = time.monotonic()
            becomes(lambda: neighbour(domain, "client1") in nearby(domain, "ap2"), wanted=True)
            record_property("mended_ms", round((time.monotonic() - began) * 1e3))
            assert degraded(domain, "ap2") == []
            exchange(near, far)
            exchange(far, near)
            # All that looks at the bridge looks at the new one.
            for ap in ("ap3", "ap2", "ap1", "ap2"):
                roam(domain, "client1", ap)
                exchange(near, far)
            for ap in ("ap1", "ap2"):
                domain.roam("client1", ap, silent=True)
                exchange(near, far)
                served_by(domain, "client1", ap)
    assert "proxy_arp = 1" in domain.run("ap2", ["sysctl", "net.ipv4.conf.br-lan.proxy_arp"]).stdout


def test_a_client_bridge_that_goes_down_and_up(domain: Lab) -> None:
    roam(domain, "client1", "ap2")
    script(domain, "ap2", "ip link set br-lan down")
    eventually(lambda: "interface br-lan is down" in degraded(domain, "ap2")[0])
    script(domain, "ap2", "ip link set br-lan up")
    assert ping(domain, "client1", SERVER)[0] == 1
    served_by(domain, "client1", "ap2")
    becomes(lambda: neighbour(domain, "client1") in nearby(domain, "ap2"), wanted=True)
    assert degraded(domain, "ap2") == []


def test_an_uplink_that_is_made_anew(domain: Lab) -> None:
    script(domain, "ap1", UPLINK_AS_BRIDGE + UPLINK_BACK)
    eventually(lambda: degraded(domain, "ap1") == [])
    with (
        listening(domain, "server", SERVER) as listener,
        tcp(domain, "client1", listener.getsockname()),
    ):
        accepted(listener)[0].close()
        known_everywhere(domain)
        script(domain, "ap1", UPLINK_GONE)
        assert any("interface wan is gone" in each for each in degraded(domain, "ap1"))
        # Masqueraded flows end with their interface, and their sessions everywhere.
        becomes(lambda: anchored(domain, "ap1"), [set()] * 3)
        script(domain, "ap1", UPLINK_BACK)
        eventually(lambda: degraded(domain, "ap1") == [])
        eventually(lambda: new_connection(domain, "client1") == uplink("ap1"))
    script(domain, "ap1", UPLINK_AS_BEFORE)
    eventually(lambda: degraded(domain, "ap1") == [])
    eventually(lambda: new_connection(domain, "client1") == uplink("ap1"))


def test_an_uplink_that_goes_down_and_up(domain: Lab) -> None:
    assert new_connection(domain, "client1") == uplink("ap1")
    script(domain, "ap1", "ip link set wan down")
    assert any("interface wan is down" in each for each in degraded(domain, "ap1"))
    script(domain, "ap1", "ip link set wan up; ip route add default via 203.0.113.1")
    eventually(lambda: degraded(domain, "ap1") == [])
    eventually(lambda: new_connection(domain, "client1") == uplink("ap1"))


def test_the_address_of_an_uplink_changes(domain: Lab) -> None:
    with (
        listening(domain, "server", SERVER) as listener,
        tcp(domain, "client1", listener.getsockname()),
    ):
        accepted(listener)[0].close()
        known_everywhere(domain)
        script(
            domain,
            "ap1",
            f"ip address del ADDRESS/24 dev wan; ip address add {NEW_ADDRESS}/24 dev wan; "
            "ip route add default via 203.0.113.1",
        )
        becomes(lambda: anchored(domain, "ap1"), [set()] * 3)
        assert not [line for line in tracked(domain, "ap1", "client1") if uplink("ap1") in line]
        eventually(lambda: new_connection(domain, "client1") == NEW_ADDRESS)
        known_everywhere(domain)
        roam(domain, "client1", "ap2")
        assert new_connection(domain, "client1") == uplink("ap2")
    script(
        domain,
        "ap1",
        f"ip address del {NEW_ADDRESS}/24 dev wan; ip address add ADDRESS/24 dev wan; "
        "ip route add default via 203.0.113.1",
    )
    assert degraded(domain, "ap1") == []


@pytest.fixture(autouse=True)
def _mended(domain: Lab) -> Iterator[None]:
    yield
    for ap in domain.aps:
        becomes(lambda: degraded(domain, ap), [])  # noqa: B023 - used at once
