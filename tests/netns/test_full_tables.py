"""Tables of the kernel that are full, and events that get lost: told, survived, mended."""

from __future__ import annotations

import contextlib
import errno
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from itertools import count

import pytest

from apagent.core.model import UDP
from apagent.errors import KernelFault
from apagent.kernel.nft.messages import NESTED
from apagent.kernel.wire import NLM_F_CREATE, NLM_F_EXCL, Message, Netlink, attribute
from apagent.lab import namespaces
from apagent.lab.lab import Lab
from tests.netns.conftest import MakeLab
from tests.netns.nat_support import (
    accepted,
    exchange,
    flows,
    forget_flows,
    known_everywhere,
    listening,
    roam,
    tcp,
)
from tests.netns.observe import (
    SERVER,
    address,
    agreed,
    ask,
    becomes,
    eventually,
    uplink,
)
from tests.netns.sockets import udp_socket

pytestmark = pytest.mark.netns

_NEW = 1 << 8
_ORIGINAL, _REPLY, _STATUS, _TIMEOUT, _MARK = 1, 2, 3, 7, 8
"""CTA_TUPLE_ORIG and so on (linux/netfilter/nfnetlink_conntrack.h)."""
_SEEN_REPLY, _ASSURED, _CONFIRMED = 1 << 1, 1 << 2, 1 << 3
"""IPS_SEEN_REPLY, IPS_ASSURED, IPS_CONFIRMED: the kernel drops none of these for a new flow."""
_U32 = struct.Struct(">I")
_FILLER_MARK, _LIFE_S = 7777, 600
_FLOW_KEY = "ipv4_addr . ipv4_addr . inet_proto . inet_service . inet_service"
SMALL = 3
LOST_FLOWS, FIRST_PORT = 40_000, 20_000


@pytest.fixture(scope="module")
def domain(module_lab: MakeLab) -> Lab:
    return module_lab(aps=3, clients=2)


@pytest.fixture(autouse=True)
def _at_ap1(domain: Lab) -> None:
    for client in domain.clients:
        roam(domain, client, "ap1")


def source_of(listener: socket.socket) -> str:
    """Where the next connection comes from, which is closed."""
    made, (source, _) = accepted(listener)
    made.close()
    return source


def degraded(lab: Lab, ap: str) -> list[str]:
    found: list[str] = ask(lab, ap, "status")["degraded"]
    return found


def fillers() -> Iterator[Message]:
    """Conntrack entries that have nothing to do with us, without end."""
    near, near_port, far, far_port = b"NEAR", b"PT", bytes([192, 0, 2, 2]), b"\0\x09"
    template = b"".join(
        (
            b"\x02\0\0\0",  # struct nfgenmsg: AF_INET
            _udp(_ORIGINAL, near, far, near_port, far_port),
            _udp(_REPLY, far, near, far_port, near_port),
            attribute(_STATUS, _U32.pack(_SEEN_REPLY | _ASSURED | _CONFIRMED)),
            attribute(_TIMEOUT, _U32.pack(_LIFE_S)),
            attribute(_MARK, _U32.pack(_FILLER_MARK)),
        )
    )
    for number in count():
        address = bytes([192, 0, 3, number >> 16])
        port = (number & 0xFFFF).to_bytes(2, "big")
        body = template.replace(near, address).replace(near_port, port)
        yield Message(_NEW, NLM_F_CREATE | NLM_F_EXCL, body, "filler")


def _udp(type_: int, source: bytes, to: bytes, source_port: bytes, to_port: bytes) -> bytes:
    addresses = attribute(1, source) + attribute(2, to)
    ports = attribute(1, bytes([UDP])) + attribute(2, source_port) + attribute(3, to_port)
    return attribute(
        type_ | NESTED, attribute(1 | NESTED, addresses) + attribute(2 | NESTED, ports)
    )


@contextlib.contextmanager
def full_conntrack(lab: Lab, ap: str) -> Iterator[None]:
    """Fill the AP's table to the last entry."""
    with namespaces.inside(lab.namespace(ap)):
        netlink = Netlink(12)
    entries = fillers()
    with contextlib.suppress(_Full):
        while True:
            try:
                netlink.request(next(entries) for _ in range(4096))
            except KernelFault as fault:
                if fault.errno not in (errno.ENOMEM, errno.ENFILE):
                    raise
                raise _Full from None
    netlink.close()
    try:
        yield
    finally:
        lab.run(ap, ["conntrack", "-D", "-m", str(_FILLER_MARK)], timeout=60)


class _Full(Exception):
    """There is no room for another entry."""


def test_a_full_conntrack_table(domain: Lab) -> None:
    with (
        listening(domain, "server", SERVER) as listener,
        tcp(domain, "client1", listener.getsockname()) as near,
    ):
        far, _ = accepted(listener)
        with far:
            known_everywhere(domain)
            with full_conntrack(domain, "ap1"):
                [trouble] = degraded(domain, "ap1")
                assert trouble.startswith("the conntrack table is full (")
                exchange(near, far)
                with pytest.raises(TimeoutError), tcp(domain, "client1", listener.getsockname()):
                    pass
                roam(domain, "client1", "ap2")
                exchange(near, far)
                with tcp(domain, "client1", listener.getsockname()):
                    assert source_of(listener) == uplink("ap2")
                roam(domain, "client1", "ap1")
            becomes(lambda: degraded(domain, "ap1"), [])
            exchange(near, far)
            with tcp(domain, "client1", listener.getsockname()):
                assert source_of(listener) == uplink("ap1")
            known_everywhere(domain)


def test_a_session_map_that_is_full(domain: Lab) -> None:
    """No map of ours has a size; one that others have made is adopted as it is."""
    domain.kill_agent("ap2")
    small = f"map lan_flows {{ type {_FLOW_KEY} : classid; size {SMALL} ; }}"
    domain.run("ap2", ["nft", f"delete table inet apagent; table inet apagent {{ {small}; }}"])
    domain.start_agent("ap2")
    with contextlib.ExitStack() as stack, listening(domain, "server", SERVER) as listener:
        pairs = []
        for _ in range(SMALL + 3):
            near = stack.enter_context(tcp(domain, "client1", listener.getsockname()))
            pairs.append((near, stack.enter_context(accepted(listener)[0])))
        eventually(lambda: degraded(domain, "ap2"))
        [trouble] = degraded(domain, "ap2")
        assert "lan_flows" in trouble
        assert "apagent cleanup" in trouble
        # Where clients are is installed as ever, and what others anchor nearby works.
        roam(domain, "client2", "ap2")
        with tcp(domain, "client2", listener.getsockname()):
            assert source_of(listener) == uplink("ap2")
        for near, far in pairs[SMALL:]:
            near.close()
            far.close()
        domain.run("ap1", ["conntrack", "-D", "-p", "tcp", "--state", "TIME_WAIT"], check=False)
        becomes(lambda: degraded(domain, "ap2"), [], 15.0)
        agreed(domain)
        roam(domain, "client1", "ap2")
        for near, far in pairs[:SMALL]:
            exchange(near, far)
    domain.kill_agent("ap2")
    domain.run("ap2", ["nft", "delete table inet apagent"])
    domain.start_agent("ap2")
    # Its claims are made anew, and a client that roams before they are known may lose to them.
    eventually(lambda: len({claims(domain, ap) for ap in domain.aps}) == 1)


def test_after_lost_events_only_the_difference_reaches_the_peers(domain: Lab) -> None:
    for ap in domain.aps:
        with namespaces.inside(domain.namespace(ap)):
            namespaces.set_sysctl("netfilter/nf_conntrack_udp_timeout", _LIFE_S)
    forget_flows(domain)
    client = address(domain, "client1")
    with udp_socket(domain, "client1") as stays, udp_socket(domain, "client1") as ends:
        for port in range(FIRST_PORT, FIRST_PORT + 50):
            stays.sendto(b"hello", (SERVER, port))
            ends.sendto(b"hello", (SERVER, port))
        becomes(lambda: len(flows(domain, "ap2", "--protocol", "udp")), 100)
        agreed(domain)
        before = feed(domain)
        with destroyed(domain, "ap2") as lost:
            domain.agents.kill("ap1", signal.SIGSTOP)
            for port in range(FIRST_PORT, FIRST_PORT + LOST_FLOWS):
                stays.sendto(b"hello", (SERVER, port))
            port = str(ends.getsockname()[1])
            domain.run("ap1", ["conntrack", "-D", "-s", client, "-p", "udp", "--sport", port])
            domain.agents.kill("ap1", signal.SIGCONT)
            becomes(lambda: ask(domain, "ap2", "status")["peer_sessions"], LOST_FLOWS, 30.0)
        after = feed(domain)
    assert ask(domain, "ap1", "status")["resyncs"] > 0
    assert (after["epoch"], after["snapshots"]) == (before["epoch"], before["snapshots"])
    assert len(lost) == 50
    assert all(f". {port} ." in line for line in lost)


def claims(lab: Lab, ap: str) -> tuple[tuple[str, str, int], ...]:
    """Who serves which client by which claim, as the AP knows it."""
    known = ask(lab, ap, "clients")
    return tuple(sorted((c["mac"], c["serving_ap"], c["generation"]) for c in known))


def feed(lab: Lab) -> dict[str, int]:
    """ap1's feed as ap2 has it."""
    found: dict[str, int] = next(peer for peer in ask(lab, "ap2", "peers") if peer["id"] == "ap1")
    return found


@contextlib.contextmanager
def destroyed(lab: Lab, ap: str) -> Iterator[list[str]]:
    """The elements that are deleted from the AP's session map within the block, a line each."""
    lines: list[str] = []
    argv = ["nft", "monitor", "destroy", "elements"]
    with lab.popen(ap, argv, stdout=subprocess.PIPE, text=True) as monitor:
        time.sleep(0.3)
        yield lines
        time.sleep(0.3)
        monitor.terminate()
        output, _ = monitor.communicate()
    lines += [line for line in output.splitlines() if "lan_flows" in line]
