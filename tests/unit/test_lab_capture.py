"""The leak filter, without any packet."""

import socket
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network

import pytest

from apagent.lab.capture import Packet, _attach, touching

CLIENTS = IPv4Network("10.77.0.0/16")


def frame(source: str, destination: str, ethertype: int = 0x0800) -> bytes:
    addresses = IPv4Address(source).packed + IPv4Address(destination).packed
    return bytes(12) + ethertype.to_bytes(2, "big") + bytes(9) + b"\x11" + bytes(2) + addresses


@pytest.fixture
def filtered() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Datagrams through the filter: it works on any socket, so no privilege is needed."""
    sender, receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with sender, receiver:
        receiver.setblocking(False)
        _attach(receiver, touching(CLIENTS))
        yield sender, receiver


@pytest.mark.parametrize(
    ("data", "passes"),
    [
        (frame("10.77.1.1", "198.51.100.10"), True),
        (frame("198.51.100.10", "10.77.255.254"), True),
        (frame("10.77.1.1", "10.77.1.2"), True),
        (frame("203.0.113.11", "198.51.100.10"), False),
        (frame("10.78.0.0", "10.76.255.255"), False),
        (frame("10.77.1.1", "198.51.100.10", ethertype=0x0806), False),
        (b"short", False),
    ],
)
def test_the_filter(
    filtered: tuple[socket.socket, socket.socket], data: bytes, passes: bool
) -> None:
    sender, receiver = filtered
    sender.send(data)
    if passes:
        assert receiver.recv(100) == data
    else:
        with pytest.raises(BlockingIOError):
            receiver.recv(100)


def test_a_packet_reads_as_a_line() -> None:
    text = str(Packet("ap1", frame("10.77.1.1", "198.51.100.10")))
    assert text == "10.77.1.1 > 198.51.100.10 protocol 17 on ap1"
