"""What new flows are translated to in a network with takeover, on the real kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import IPv4Address

import pytest

from apagent.core.model import Mac
from apagent.kernel.linux import LinuxDataPath
from apagent.kernel.port import Change, NetworkDelta
from tests.contract import packets
from tests.contract.conftest import AccessPoint
from tests.contract.packets import Packet, Wire
from tests.contract.test_nft_packets import served_here
from tests.domains import ANN, ANN_IP, LAN, domain, takeover

pytestmark = pytest.mark.netns

UPLINKS = IPv4Address("203.0.113.11")
OURS, THEIRS = IPv4Address("203.0.113.21"), IPv4Address("203.0.113.22")


@pytest.fixture
def path(access_point: AccessPoint) -> Iterator[LinuxDataPath]:
    access_point.forward_to_the_internet()
    path = LinuxDataPath()
    path.prepare(domain(networks=(takeover(),)))
    path.release_hold()
    path.apply({LAN: served_here()})
    yield path
    path.close()


@pytest.fixture
def internet(access_point: AccessPoint) -> Iterator[Wire]:
    """What leaves by the uplink."""
    with ExitStack() as stack:
        yield stack.enter_context(packets.wire("internet"))


def change_source(path: LinuxDataPath, old: IPv4Address | None, new: IPv4Address | None) -> None:
    path.apply({LAN: NetworkDelta(sources={"wan": Change(old, new)})})


def test_existing_flows_keep_what_they_were_given(
    path: LinuxDataPath, access_point: AccessPoint, internet: Wire
) -> None:
    def source(packet: Packet, mac: Mac = ANN) -> IPv4Address:
        access_point.send(mac, packet)
        [sent] = internet.packets_until(lambda _: True)
        return sent.source

    first = packets.udp(ANN_IP, 5000)
    second = packets.tcp(ANN_IP, 5001, packets.SYN)
    third = packets.echo_request(ANN_IP, 5002)
    assert source(first) == UPLINKS
    change_source(path, None, OURS)
    assert [source(first), source(second)] == [UPLINKS, OURS]
    change_source(path, OURS, THEIRS)
    assert [source(first), source(second), source(third)] == [UPLINKS, OURS, THEIRS]
    change_source(path, THEIRS, None)
    assert [source(first), source(second), source(third)] == [UPLINKS, OURS, THEIRS]
    assert source(packets.udp(ANN_IP, 5003)) == UPLINKS


def test_another_uplinks_source_is_not_ours(
    path: LinuxDataPath, access_point: AccessPoint, internet: Wire
) -> None:
    path.apply({LAN: NetworkDelta(sources={"dsl": Change(None, OURS)})})
    access_point.send(ANN, packets.udp(ANN_IP, 5000))
    [sent] = internet.packets_until(lambda _: True)
    assert sent.source == UPLINKS
