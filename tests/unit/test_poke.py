"""The segments that rouse a client, as another implementation of TCP/IP reads them."""

from __future__ import annotations

from typing import Any

import pytest
from scapy.layers.inet import IP, TCP

from apagent.kernel.poke import segments
from tests.domains import ANN_IP, tcp


@pytest.mark.parametrize(("number", "sequence"), [(0, 0), (1, 1 << 31)])
def test_it_is_an_acknowledgement_of_the_server_with_right_checksums(
    number: int, sequence: int
) -> None:
    packed = segments(tcp(40000))[number]
    packet: Any = IP(packed)
    assert (packet.src, packet.dst) == ("198.51.100.10", str(ANN_IP))
    assert (packet[TCP].sport, packet[TCP].dport) == (80, 40000)
    assert (packet[TCP].flags, packet[TCP].seq) == ("A", sequence)
    assert ("Timestamp", (sequence, 0)) in packet[TCP].options
    del packet.chksum
    del packet[TCP].chksum
    assert bytes(packet) == packed
