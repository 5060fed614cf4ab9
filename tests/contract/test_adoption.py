"""Flows that go on at another anchor: address and entries move from A to S, on real kernels."""

from __future__ import annotations

import errno
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing
from functools import partial
from ipaddress import IPv4Address

import pytest

from apagent.core.model import ESTABLISHED, ICMP, STATE, TCP, Flow, FlowKey, Nat, Translation
from apagent.errors import KernelFault
from apagent.kernel.arp import ArpAnnouncer
from apagent.kernel.conntrack import LinuxFlowMonitor
from apagent.kernel.wire import Netlink
from tests.contract.conftest import run
from tests.contract.flow_support import (
    CLIENT,
    OTHER_CLIENT,
    OUTSIDE,
    SERVER,
    Router,
    inside,
    namespace,
    routed,
    run_inside,
)
from tests.contract.packets import eventually
from tests.domains import LAN, takeover

pytestmark = pytest.mark.netns

NAT_ADDRESS = IPv4Address("203.0.113.21")
NETWORK = takeover(address=str(NAT_ADDRESS))
PORT = 5001
PATIENCE_S = 5.0

_UPLINK = """
link set lo up
link add br0 type bridge
link set br0 up
link add port_a type veth peer name wan netns {a}
link add port_s type veth peer name wan netns {s}
link add port_server type veth peer name eth0 netns {server}
link set port_a master br0 up
link set port_s master br0 up
link set port_server master br0 up
"""
_ROUTER = """
link set lo up
link set wan up
address add {outside}/24 dev wan
link add lan type veth peer name {name} netns {client}
link set lan up
address add {gateway}/30 dev lan
route add {client_address} via {next_hop}
"""
_CLIENT = f"""
link set lo up
address add {CLIENT}/32 dev lo
link set to_a up
link set to_s up
address add 10.0.1.2/30 dev to_a
address add 10.0.2.2/30 dev to_s
route add default via 10.0.1.1 src {CLIENT}
"""
_RULES = """
table ip t {
    chain c {
        type nat hook postrouting priority srcnat
        oifname "wan" ip saddr 10.77.0.0/16 RULE
    }
    chain stray {
        type filter hook forward priority 0
        oifname "wan" ct state new tcp flags != syn drop
        oifname "wan" ct state invalid drop
    }
}
"""


class Segment:
    """A client, two routers A and S with an uplink segment in common, and a server on it.

    The client's packets go by A until A is dead.
    """

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.client, self.a, self.s, self.server, switch = (namespace(stack) for _ in range(5))
        uplink = _UPLINK.format(a=self.a, s=self.s, server=self.server)
        run_inside(switch, "ip", "-batch", "-", stdin=uplink)
        self._router(self.a, "to_a", "203.0.113.11", 1, f"snat to {NAT_ADDRESS}")
        run_inside(self.a, "ip", "address", "add", f"{NAT_ADDRESS}/32", "dev", "wan")
        self._router(self.s, "to_s", "203.0.113.12", 2, "masquerade")
        run_inside(self.client, "ip", "-batch", "-", stdin=_CLIENT)
        run_inside(self.server, "ip", "link", "set", "eth0", "up")
        run_inside(self.server, "ip", "address", "add", f"{SERVER}/24", "dev", "eth0")
        self.monitor_a, self.monitor_s = (
            stack.enter_context(closing(inside(pid, partial(LinuxFlowMonitor, [NETWORK]))))
            for pid in (self.a, self.s)
        )

    def open(self, pid: int, kind: int, address: IPv4Address, port: int) -> socket.socket:
        made = self._stack.enter_context(inside(pid, lambda: socket.socket(socket.AF_INET, kind)))
        made.settimeout(PATIENCE_S)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((str(address), port))
        return made

    def connection(self, port: int) -> tuple[socket.socket, socket.socket]:
        """Both ends of a TCP connection from the client to the server."""
        listener = self.open(self.server, socket.SOCK_STREAM, SERVER, port)
        listener.listen()
        client = self.open(self.client, socket.SOCK_STREAM, CLIENT, port)
        client.connect((str(SERVER), port))
        server, (seen, _) = listener.accept()
        assert seen == str(NAT_ADDRESS)
        server.settimeout(PATIENCE_S)
        return client, self._stack.enter_context(server)

    def forward(self, protocol: str) -> None:
        """Both send what comes to the NAT address to the same port of the client."""
        for pid in (self.a, self.s):
            rule = f"ip daddr {NAT_ADDRESS} {protocol} dport {PORT} dnat to {CLIENT}"
            chain = "chain ip t in { type nat hook prerouting priority dstnat; }"
            run_inside(pid, "nft", f"add {chain}; add rule ip t in {rule}")

    def call(self) -> tuple[socket.socket, socket.socket]:
        """The server opens a connection to the forwarded port: the client's listener, its end."""
        listener = self.open(self.client, socket.SOCK_STREAM, CLIENT, PORT)
        listener.listen()
        server = self.open(self.server, socket.SOCK_STREAM, SERVER, PORT)
        server.setblocking(False)
        server.connect_ex((str(NAT_ADDRESS), PORT))
        return listener, server

    def move(self, *, adopt: bool = True, forwarded: bool = False) -> dict[FlowKey, Nat]:
        """A loses its power; S has its entries and its address. The sessions of A."""
        sessions = dict(self.monitor_a.dump()[LAN])
        run_inside(self.a, "ip", "link", "del", "wan")
        run_inside(self.a, "ip", "link", "del", "lan")
        if adopt:
            self.monitor_s.adopt(LAN, sessions, sessions if forwarded else ())
        self._give_address(self.s, 2)
        return sessions

    def hand_over(
        self, *, to_s: bool, client_follows: bool = True, forwarded: bool = False
    ) -> None:
        """One of them gives the address to the other, and keeps its entries for now."""
        giver, taker = (self.a, self.s) if to_s else (self.s, self.a)
        monitors = (self.monitor_a, self.monitor_s) if to_s else (self.monitor_s, self.monitor_a)
        sessions = monitors[0].dump()[LAN]
        monitors[1].adopt(LAN, sessions, sessions if forwarded else ())
        run_inside(giver, "ip", "address", "del", f"{NAT_ADDRESS}/32", "dev", "wan")
        self._give_address(taker, 2 if to_s else 1, client_follows=client_follows)

    def _give_address(self, pid: int, number: int, *, client_follows: bool = True) -> None:
        run_inside(pid, "ip", "address", "add", f"{NAT_ADDRESS}/32", "dev", "wan")
        with closing(inside(pid, partial(ArpAnnouncer, "wan"))) as announcer:
            announcer.tell_all([NAT_ADDRESS])
        route = ("default", "via", f"10.0.{number}.1", "src", str(CLIENT))
        if client_follows:
            run_inside(self.client, "ip", "route", "replace", *route)

    def _router(self, pid: int, name: str, outside: str, number: int, rule: str) -> None:
        setup = _ROUTER.format(
            outside=outside,
            name=name,
            client=self.client,
            gateway=f"10.0.{number}.1",
            client_address=CLIENT,
            next_hop=f"10.0.{number}.2",
        )
        run_inside(pid, "ip", "-batch", "-", stdin=setup)
        run_inside(pid, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        run_inside(pid, "nft", "-f", "-", stdin=_RULES.replace("RULE", rule))


@pytest.fixture
def segment() -> Iterator[Segment]:
    with ExitStack() as stack:
        yield Segment(stack)


def test_a_tcp_connection_goes_on_in_both_directions(segment: Segment) -> None:
    client, server = segment.connection(PORT)
    server.sendall(b"before" * 1000)
    assert received(client, 6000) == b"before" * 1000
    [nat] = segment.move().values()
    assert nat[STATE] & ESTABLISHED
    server.sendall(b"after" * 100_000)
    assert received(client, 500_000) == b"after" * 100_000
    client.sendall(b"up" * 100_000)
    assert received(server, 200_000) == b"up" * 100_000
    assert server.getpeername()[0] == str(NAT_ADDRESS)
    client.shutdown(socket.SHUT_WR)
    assert server.recv(1) == b""


def test_a_tcp_connection_comes_back_to_an_entry_that_knows_an_old_window(segment: Segment) -> None:
    client, server = segment.connection(PORT)
    for to_s in (True, False):
        segment.hand_over(to_s=to_s)
        for one, other in ((server, client), (client, server)) * 100:
            one.sendall(b"data" * 2500)
            assert received(other, 10_000) == b"data" * 2500


def test_a_connection_goes_on_while_each_router_sees_one_direction_only(segment: Segment) -> None:
    """The server's packets go by S already, the client's still by A: it has been told to."""
    client, server = segment.connection(PORT)
    segment.monitor_a.loosen(list(segment.monitor_a.dump()[LAN]))
    segment.hand_over(to_s=True, client_follows=False)
    for one, other in ((server, client), (client, server)) * 100:
        one.sendall(b"data" * 2500)
        assert received(other, 10_000) == b"data" * 2500


def test_without_its_entry_it_does_not(segment: Segment) -> None:
    client, server = segment.connection(PORT)
    segment.move(adopt=False)
    client.settimeout(1)
    server.sendall(b"after")
    with pytest.raises(TimeoutError):
        client.recv(5)


def test_a_handshake_that_was_on_its_way_is_completed(segment: Segment) -> None:
    """The server's answer was lost with A; the client repeats its first segment in a second."""
    listener = segment.open(segment.server, socket.SOCK_STREAM, SERVER, PORT)
    listener.listen()
    chain = "chain ip t lost { type filter hook prerouting priority -300; }"
    lost = f"add {chain}; add rule ip t lost iifname wan meta l4proto tcp drop"
    run_inside(segment.a, "nft", lost)
    client = segment.open(segment.client, socket.SOCK_STREAM, CLIENT, PORT)
    client.setblocking(False)
    client.connect_ex((str(SERVER), PORT))
    assert eventually(lambda: bool(segment.monitor_a.dump()[LAN]))
    [nat] = segment.move().values()
    assert not nat[STATE] & ESTABLISHED
    assert eventually(partial(connected, client))
    client.sendall(b"hello")
    accepted, (seen, _) = listener.accept()
    with accepted:
        assert (seen, accepted.recv(5)) == (str(NAT_ADDRESS), b"hello")


def test_datagrams_keep_their_address_and_port(segment: Segment) -> None:
    server = segment.open(segment.server, socket.SOCK_DGRAM, SERVER, PORT)
    client = segment.open(segment.client, socket.SOCK_DGRAM, CLIENT, PORT)

    def echo() -> tuple[str, int]:
        client.sendto(b"ping", (str(SERVER), PORT))
        _, seen = server.recvfrom(10)
        server.sendto(b"pong", seen)
        assert client.recv(10) == b"pong"
        address, port = seen
        return str(address), int(port)

    before = echo()
    segment.move()
    assert echo() == before


def test_what_the_server_sends_first_arrives(segment: Segment) -> None:
    """A datagram to a client that only listens."""
    server = segment.open(segment.server, socket.SOCK_DGRAM, SERVER, PORT)
    client = segment.open(segment.client, socket.SOCK_DGRAM, CLIENT, PORT)
    client.sendto(b"ping", (str(SERVER), PORT))
    _, seen = server.recvfrom(10)
    segment.move()
    server.sendto(b"pong", seen)
    assert client.recv(10) == b"pong"


def test_a_ping_keeps_its_identifier(segment: Segment) -> None:
    ping = ("ping", "-c1", "-W5", "-e77", f"-I{CLIENT}", str(SERVER))
    run_inside(segment.client, *ping)
    flow = Flow(ICMP, CLIENT, 77, SERVER, 0).key
    assert segment.move() == {flow: Translation(NAT_ADDRESS, 77).packed}
    run_inside(segment.client, *ping)
    assert segment.monitor_s.dump()[LAN] == {flow: Translation(NAT_ADDRESS, 77).packed}


def test_a_connection_that_was_let_in_goes_on_in_both_directions(segment: Segment) -> None:
    """There, and back to an entry that knows an old window."""
    segment.forward("tcp")
    listener, server = segment.call()
    client, seen = listener.accept()
    server.settimeout(PATIENCE_S)
    client.settimeout(PATIENCE_S)
    with client:
        for to_s in (True, False):
            segment.hand_over(to_s=to_s, forwarded=True)
            for one, other in ((server, client), (client, server)) * 20:
                one.sendall(b"data" * 2500)
                assert received(other, 10_000) == b"data" * 2500
        assert seen == (str(SERVER), PORT)


def test_one_that_was_let_in_is_what_it_was(segment: Segment) -> None:
    """Opened from outside, and translated as before."""
    segment.forward("tcp")
    listener, _ = segment.call()
    listener.accept()[0].close()
    flow = Flow(TCP, CLIENT, PORT, SERVER, PORT).key
    before = run_inside(segment.a, "conntrack", "-L")
    segment.hand_over(to_s=True, forwarded=True)
    tuples = r"src=\S+ dst=\S+ sport=\d+ dport=\d+"
    after = run_inside(segment.s, "conntrack", "-L")
    assert re.findall(tuples, after) == re.findall(tuples, before)
    assert segment.monitor_s.dump()[LAN] == segment.monitor_a.dump()[LAN]
    segment.monitor_s.read()
    segment.monitor_s.end(LAN, [flow])
    assert [batch.changes for batch in segment.monitor_s.read()] == [{flow: None}]


def test_a_handshake_from_outside_that_was_on_its_way_is_completed(segment: Segment) -> None:
    """The client's answer was lost with A; both ends repeat their first segments in a second."""
    segment.forward("tcp")
    chain = "chain ip t lost { type filter hook prerouting priority -300; }"
    lost = f"add {chain}; add rule ip t lost iifname lan meta l4proto tcp drop"
    run_inside(segment.a, "nft", lost)
    listener, server = segment.call()
    assert eventually(lambda: bool(segment.monitor_a.dump()[LAN]))
    [nat] = segment.move(forwarded=True).values()
    assert not nat[STATE] & ESTABLISHED
    assert eventually(partial(connected, server))
    server.sendall(b"hello")
    accepted, seen = listener.accept()
    with accepted:
        assert (seen, accepted.recv(5)) == ((str(SERVER), PORT), b"hello")


@pytest.mark.parametrize("answered", [True, False])
def test_datagrams_that_were_let_in_go_on(segment: Segment, *, answered: bool) -> None:
    """The next one comes from outside."""
    segment.forward("udp")
    server = segment.open(segment.server, socket.SOCK_DGRAM, SERVER, PORT)
    client = segment.open(segment.client, socket.SOCK_DGRAM, CLIENT, PORT)

    def call(*, answer: bool = True) -> None:
        server.sendto(b"ping", (str(NAT_ADDRESS), PORT))
        _, seen = client.recvfrom(10)
        assert seen == (str(SERVER), PORT)
        if answer:
            client.sendto(b"pong", seen)
            assert server.recvfrom(10) == (b"pong", (str(NAT_ADDRESS), PORT))

    call(answer=answered)
    assert len(segment.move(forwarded=True)) == 1
    call()


def received(end: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := end.recv(size - len(data))):
        data += more
    return data


def connected(end: socket.socket) -> bool:
    try:
        end.getpeername()
    except OSError:
        return False
    return True


# Entries


@pytest.fixture
def router() -> Iterator[Router]:
    with routed() as router:
        yield router


@pytest.fixture
def monitor(router: Router) -> Iterator[LinuxFlowMonitor]:
    with closing(LinuxFlowMonitor([NETWORK])) as monitor:
        yield monitor


@pytest.mark.parametrize(
    ("protocol", "established", "state"),
    [
        (6, True, r"ESTABLISHED src.*\[ASSURED\]"),
        (6, False, r"SYN_RECV src=\S+ dst=\S+ sport=\d+ dport=\d+ src"),
        (17, True, r"\[ASSURED\]"),
        (17, False, r"\[UNREPLIED\]"),
        (1, False, r"\[UNREPLIED\]"),
    ],
)
def test_an_entry_is_as_far_as_its_flow(
    monitor: LinuxFlowMonitor, protocol: int, established: bool, state: str
) -> None:
    flow = Flow(protocol, CLIENT, 77, SERVER, 0 if protocol == ICMP else 80)
    nat = Translation(NAT_ADDRESS, 4000, established=established)
    monitor.adopt(LAN, {flow.key: nat.packed})
    [listed] = run("conntrack", "-L", "-n").splitlines()
    assert re.search(state, listed)
    assert f"src={SERVER} dst={NAT_ADDRESS}" in listed


@pytest.mark.parametrize(
    ("sysctl", "protocol", "established", "expected"),
    [
        ("tcp_timeout_established", 6, True, (7430, 7440)),
        ("tcp_timeout_established=600", 6, True, (590, 600)),
        ("tcp_timeout_syn_recv", 6, False, (230, 240)),
        ("udp_timeout_stream=300", 17, True, (290, 300)),
        ("udp_timeout=40", 17, False, (30, 40)),
        ("icmp_timeout=50", 1, False, (40, 50)),
    ],
)
def test_an_entry_lives_as_long_as_one_of_its_kind(
    monitor: LinuxFlowMonitor,
    sysctl: str,
    protocol: int,
    established: bool,
    expected: tuple[int, int],
) -> None:
    if "=" in sysctl:
        run("sysctl", "-qw", f"net.netfilter.nf_conntrack_{sysctl}")
    flow = Flow(protocol, CLIENT, 77, SERVER, 0 if protocol == ICMP else 80)
    nat = Translation(NAT_ADDRESS, 4000, established=established)
    monitor.adopt(LAN, {flow.key: nat.packed})
    [listed] = run("conntrack", "-L").splitlines()
    assert expected[0] <= int(listed.split()[2]) <= expected[1]


def test_an_untranslated_entry_gives_way(monitor: LinuxFlowMonitor) -> None:
    flow = Flow(17, CLIENT, 77, SERVER, 53)
    tuple_ = ("-s", str(CLIENT), "-d", str(SERVER), "-p", "udp", "--sport", "77", "--dport", "53")
    run("conntrack", "-I", *tuple_, "-t", "60")
    assert monitor.dump()[LAN] == {}
    nat = Translation(NAT_ADDRESS, 77).packed
    monitor.adopt(LAN, {flow.key: nat})
    assert monitor.dump()[LAN] == {flow.key: nat}


def test_a_translation_that_another_flow_has_stays_with_it(
    router: Router, monitor: LinuxFlowMonitor
) -> None:
    ours = router.open(17, 4242, OTHER_CLIENT)
    theirs = Flow(17, CLIENT, 4242, SERVER, 53).key
    other = Flow(17, CLIENT, 4243, SERVER, 53).key
    nat, other_nat = (Translation(OUTSIDE, port).packed for port in (4242, 4243))
    assert set(monitor.adopt(LAN, {theirs: nat, other: other_nat})) == {theirs}
    assert monitor.dump()[LAN] == {ours: nat, other: other_nat}


def test_what_a_server_sent_before_the_flow_was_here_is_not_in_its_way(
    monitor: LinuxFlowMonitor,
) -> None:
    flow = Flow(17, CLIENT, 77, SERVER, 53)
    sent = ("-s", str(SERVER), "-d", str(NAT_ADDRESS), "-p", "udp", "--sport", "53", "--dport")
    for port in ("4077", "4078"):
        run("conntrack", "-I", *sent, port, "-t", "60")
    nat = Translation(NAT_ADDRESS, 4077).packed
    monitor.adopt(LAN, {flow.key: nat})
    assert monitor.dump()[LAN] == {flow.key: nat}
    assert "dport=4078" in run("conntrack", "-L")  # nobody's way


def test_what_the_kernel_refuses_is_named(
    monitor: LinuxFlowMonitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = KernelFault("adopting a flow: Cannot allocate memory (ENOMEM)", errno.ENOMEM)
    monkeypatch.setattr(Netlink, "attempt", lambda *_: {1: full})
    flows = [Flow(17, CLIENT, port, SERVER, 53).key for port in (77, 78)]
    with pytest.raises(KernelFault, match=r"udp 10\.77\.1\.1:78 > 203.*ENOMEM"):
        monitor.adopt(LAN, dict.fromkeys(flows, Translation(NAT_ADDRESS, 77).packed))
