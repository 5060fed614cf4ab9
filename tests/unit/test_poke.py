"""The segment that rouses a client, as another implementation of TCP/IP reads it."""

from __future__ import annotations

from typing import Any

from scapy.layers.inet import IP, TCP

from apagent.kernel.poke import segment
from tests.domains import ANN_IP, tcp


def test_it_is_an_acknowledgement_of_the_server_with_right_checksums() -> None:
    packed = segment(tcp(40000))
    packet: Any = IP(packed)
    assert (packet.src, packet.dst) == ("198.51.100.10", str(ANN_IP))
    assert (packet[TCP].sport, packet[TCP].dport) == (80, 40000)
    assert (packet[TCP].flags, packet[TCP].seq) == ("A", 0)
    del packet.chksum
    del packet[TCP].chksum
    assert bytes(packet) == packed
