"""A connection that nobody knows any more is reset; it never gets a new translation."""

from __future__ import annotations

import pytest

from apagent.lab.lab import Lab
from tests.netns.conftest import MakeLab
from tests.netns.observe import address, agreed, ask, becomes, served_by, sessions, uplink
from tests.netns.sockets import connection

pytestmark = pytest.mark.netns


@pytest.fixture(scope="module")
def domain(module_lab: MakeLab) -> Lab:
    return module_lab(aps=2, clients=1)


@pytest.mark.parametrize("serving_ap", ["ap1", "ap2"], ids=["at-its-anchor", "through-the-tunnel"])
def test_a_connection_without_a_conntrack_entry_is_reset(domain: Lab, serving_ap: str) -> None:
    domain.roam("client1", "ap1")
    served_by(domain, "client1", "ap1")
    with connection(domain, "client1") as opened:
        assert opened.source == uplink("ap1")
        becomes(lambda: len(sessions(domain, "ap2", "--protocol", "tcp")), 1)
        agreed(domain)
        domain.roam("client1", serving_ap)
        served_by(domain, "client1", serving_ap)
        opened.exchange(b"well so far")
        resets = _resets(domain)

        domain.run(
            "ap1", ["conntrack", "-D", "-p", "tcp", "--orig-src", address(domain, "client1")]
        )
        opened.client.sendall(b"is anybody there?")
        with pytest.raises(ConnectionResetError):
            opened.client.recv(100)

        assert _resets(domain) > resets
        becomes(
            lambda: [sessions(domain, ap, "--protocol", "tcp") for ap in domain.aps], [set()] * 2
        )
        opened.server.setblocking(False)
        with pytest.raises(BlockingIOError):
            opened.server.recv(100)


def _resets(lab: Lab) -> int:
    return sum(int(ask(lab, ap, "status")["reset_packets"]) for ap in lab.aps)
