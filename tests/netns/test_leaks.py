"""The search for leaks can fail, and the leak guard stops what nobody translates."""

from __future__ import annotations

import pytest

from tests.netns.conftest import MakeLab
from tests.netns.observe import SERVER, ask
from tests.netns.sockets import udp_socket

pytestmark = pytest.mark.netns

PACKETS = 50
_PORT = 9
_NOTRACK = f"""
table inet mistake {{
    chain prerouting {{
        type filter hook prerouting priority -310;
        iifname "br-lan" udp dport {_PORT} notrack
    }}
}}
"""


def test_an_ap_that_forwards_without_translating_is_found_out(lab: MakeLab) -> None:
    bare = lab(aps=1, clients=1, agents=False)
    with bare.watch_for_leaks() as leaks, udp_socket(bare, "client1") as client:
        bare.run("ap1", ["nft", "flush", "ruleset"])
        for _ in range(PACKETS):
            client.sendto(b"in the open", (SERVER, _PORT))
        # The router has no way back to the client, so nothing comes of it but the packets.
        assert leaks.count() == PACKETS
    assert str(leaks.packets()[0]).startswith(f"10.77.1.1 > {SERVER} protocol 17")


def test_the_leak_guard_drops_and_counts(lab: MakeLab) -> None:
    # Not a lab with agents: there, this very counter fails the test.
    bare = lab(aps=1, clients=1, agents=False)
    bare.start_agent("ap1")
    bare.run("ap1", ["nft", _NOTRACK])
    with bare.watch_for_leaks() as leaks, udp_socket(bare, "client1") as client:
        for _ in range(PACKETS):
            client.sendto(b"in the open", (SERVER, _PORT))
        assert ask(bare, "ap1", "status")["leaked_packets"] == PACKETS
    assert leaks.count() == 0
