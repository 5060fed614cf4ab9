"""Opens flows at a rate: the first packet of each, prepared as whole frames, many a system call.

Runs in a client's namespace. A flow is known by its number: even ones are TCP (a SYN), odd ones
UDP, each from a port of its own as far as 64,000 ports reach, to addresses in 198.18.0.0/15, which
are set aside for benchmarks (RFC 2544, appendix C). Nobody answers there: that is the least that a
flow can cost whoever replicates it. sendmmsg(2) is called by ctypes, since Python doesn't offer it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address

from apagent.kernel.datagrams import Iovec, Mmsghdr

TICK_S = 0.001
_MOST_IN_A_CALL = 256
_FIRST_PORT, _PORTS = 1024, 64_000
_FIRST_REMOTE = int(IPv4Address("198.18.0.1"))
REMOTES = "198.18.0.0/15"
_TCP, _UDP = 6, 17
_SYN = 0x02
REMOTE_PORT = 443

_ETHERNET = struct.Struct(">6s6sH")
_IPV4 = struct.Struct(">BBHHHBBHII")
_UDP_HEADER = struct.Struct(">HHHH")
_TCP_HEADER = struct.Struct(">HHIIBBHHH")
_ETHERTYPE_IPV4 = 0x0800
_FRAME_SIZE = _ETHERNET.size + _IPV4.size + _TCP_HEADER.size
"""Of every frame: a UDP datagram is filled up to a SYN's size."""


@dataclass(frozen=True, slots=True)
class Sender:
    """Who opens the flows, and the gateway's MAC."""

    mac: bytes
    gateway: bytes
    address: IPv4Address


def protocol(number: int) -> int:
    """The protocol of flow `number`."""
    return _UDP if number % 2 else _TCP


def port(number: int) -> int:
    """The client's port of flow `number`."""
    return _FIRST_PORT + number % _PORTS


def remote(number: int) -> int:
    """The server's address of flow `number`."""
    return _FIRST_REMOTE + number // _PORTS


def frame(sender: Sender, number: int, to: IPv4Address | None = None) -> bytes:
    """The first packet of flow `number`, with its Ethernet header; `to` names another server."""
    source, kind = int(sender.address), protocol(number)
    destination = remote(number) if to is None else int(to)
    length = _IPV4.size + _TCP_HEADER.size
    head = _IPV4.pack(0x45, 0, length, 0, 0, 64, kind, 0, source, destination)
    head = head[:10] + _checksum(head).to_bytes(2, "big") + head[12:]
    if kind == _UDP:
        size = _TCP_HEADER.size
        body = _UDP_HEADER.pack(port(number), REMOTE_PORT, size, 0).ljust(size, b"\0")
    else:
        fields = (port(number), REMOTE_PORT, number, 0, 0x50, _SYN, 65535)
        body = _TCP_HEADER.pack(*fields, 0, 0)
        pseudo = struct.pack(">IIHH", source, destination, kind, len(body))
        body = _TCP_HEADER.pack(*fields, _checksum(pseudo + body), 0)
    return _ETHERNET.pack(sender.gateway, sender.mac, _ETHERTYPE_IPV4) + head + body


def _checksum(data: bytes) -> int:
    """RFC 1071, for an even number of bytes."""
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


class Frames:
    """Frames ready to be sent by sendmmsg."""

    def __init__(self, frames: list[bytes]) -> None:
        self._data = ctypes.create_string_buffer(b"".join(frames))
        start = ctypes.addressof(self._data)
        self._iovecs = (Iovec * len(frames))()
        self._headers = (Mmsghdr * len(frames))()
        iovecs = ctypes.addressof(self._iovecs)
        offset = 0
        for index, one in enumerate(frames):
            self._iovecs[index] = Iovec(start + offset, len(one))
            message = self._headers[index].message
            message.iov = iovecs + index * ctypes.sizeof(Iovec)
            message.iov_count = 1
            offset += len(one)
        self._first = ctypes.addressof(self._headers)
        self._sendmmsg: Callable[..., int] = ctypes.CDLL(None, use_errno=True).sendmmsg

    def __len__(self) -> int:
        return len(self._headers)

    def send(self, packets: socket.socket, first: int, count: int) -> int:
        """Send `count` frames from `first` on; how many the kernel took. Raises OSError."""
        at = ctypes.c_void_p(self._first + first * ctypes.sizeof(Mmsghdr))
        sent = self._sendmmsg(packets.fileno(), at, min(count, _MOST_IN_A_CALL), 0)
        if sent < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return sent


def packet_socket(interface: str) -> socket.socket:
    """A socket for whole frames on `interface` of the current namespace; it receives nothing."""
    packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    packets.bind((interface, 0))
    packets.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
    return packets


def send_at_rate(packets: socket.socket, frames: Frames, rate: float) -> None:
    """Send all frames, `rate` a second in bursts of a millisecond; 0: as fast as they go."""
    started = time.monotonic()
    done = 0
    while done < len(frames):
        due = len(frames)
        if rate:
            due = min(due, int((time.monotonic() - started) * rate) + 1)
        if done < due:
            done += frames.send(packets, done, due - done)
        else:
            time.sleep(TICK_S)


def main(argv: list[str] | None = None) -> int:
    """Prepare the frames, say `ready`, send them when a line comes in, and say when that was."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--interface", default="wlan0")
    made.add_argument("--mac", type=lambda text: bytes.fromhex(text.replace(":", "")))
    made.add_argument("--gateway", type=lambda text: bytes.fromhex(text.replace(":", "")))
    made.add_argument("--address", type=IPv4Address)
    made.add_argument("--first", type=int, default=0, help="number of the first flow")
    made.add_argument("--flows", type=int)
    made.add_argument("--rate", type=float, default=0, help="flows a second; 0: no limit")
    options = made.parse_args(argv)
    sender = Sender(options.mac, options.gateway, options.address)
    numbers = range(options.first, options.first + options.flows)
    frames = Frames([frame(sender, number) for number in numbers])
    packets = packet_socket(options.interface)
    _say("ready")
    sys.stdin.readline()
    began = time.monotonic_ns()
    send_at_rate(packets, frames, options.rate)
    _say("result", began_ns=began, ended_ns=time.monotonic_ns(), flows=len(frames))
    return 0


def _say(event: str, **fields: object) -> None:
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
