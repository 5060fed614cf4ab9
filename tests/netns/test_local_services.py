"""What clients ask of the AP itself is answered by the AP that serves them, wherever they roam.

Each AP has a dnsmasq on the gateway address, which tells which AP it is: by DNS in a TXT record, by
DHCP in the domain name (option 15).
"""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from apagent.lab import namespaces
from apagent.lab.lab import Lab
from apagent.lab.plan import GATEWAY, RADIO
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
    udp,
)
from tests.netns.observe import SERVER, address, eventually, mac, tracked, uplink

pytestmark = pytest.mark.netns

GATEWAY_ADDRESS = str(GATEWAY)
PATH = ("ap1", "ap2", "ap3", "ap1")
RETRIES, RETRY_S = 10, 0.2

TXT, CLASS_IN = 16, 1
HEADER = struct.Struct(">6H")
RECURSION_DESIRED = 0x0100
"""RFC 1035, section 4.1."""

DISCOVER, OFFER, REQUEST, ACK = 1, 2, 3, 5
MAGIC = bytes((99, 130, 83, 99))
BOOTP = struct.Struct(">4B I 2H 4s4s4s4s 16s 192x 4s")
"""RFC 2131, section 2: op, htype, hlen, hops, xid, secs, flags, ciaddr, yiaddr, siaddr, giaddr,
chaddr, sname and file, and the magic cookie before the options (RFC 2132)."""
REQUESTED, MESSAGE_TYPE, SERVER_ID, DOMAIN_NAME, END = 50, 53, 54, 15, 255
TRANSACTION = 0x61706167


@pytest.fixture(scope="module")
def domain(module_lab: MakeLab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = module_lab(aps=3, clients=1)
    with contextlib.ExitStack() as stack:
        for ap in made.aps:
            directory = tmp_path_factory.mktemp(ap)
            stack.enter_context(_dnsmasq(made, ap, directory))
        yield made


@contextlib.contextmanager
def _dnsmasq(lab: Lab, ap: str, directory: Path) -> Iterator[None]:
    argv = [
        "dnsmasq",
        "--keep-in-foreground",
        "--conf-file=/dev/null",
        "--no-resolv",
        "--no-hosts",
        "--no-ping",
        "--user=root",
        "--group=",  # none: in a user namespace setgroups(2) is denied
        f"--pid-file={directory}/pid",
        f"--dhcp-leasefile={directory}/leases",
        "--interface=br-lan",
        "--bind-interfaces",
        "--except-interface=lo",
        f"--txt-record=ap.lab,{ap}",
        "--dhcp-range=10.77.200.1,10.77.200.50,1h",
        "--dhcp-authoritative",
        f"--domain={ap}.lab",
    ]
    with lab.popen(ap, argv, stderr=subprocess.PIPE, text=True) as process:
        try:
            with namespaces.inside(lab.namespace(ap)):
                eventually(_listens)
            yield
        finally:
            process.terminate()
            process.communicate()


def _listens() -> bool:
    return any(line.split()[1].endswith(":0035") for line in _sockets())


def _sockets() -> list[str]:
    return Path("/proc/thread-self/net/udp").read_text().splitlines()[1:]


def ask_dns(client: socket.socket, name: str = "ap.lab") -> str:
    """The text that the resolver on the gateway address has under the name."""
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
    question = labels + b"\0" + struct.pack(">2H", TXT, CLASS_IN)
    query = HEADER.pack(7, RECURSION_DESIRED, 1, 0, 0, 0) + question
    client.settimeout(RETRY_S)
    for _ in range(RETRIES):
        client.sendto(query, (GATEWAY_ADDRESS, 53))
        with contextlib.suppress(TimeoutError):
            answer, source = client.recvfrom(512)
            assert source == (GATEWAY_ADDRESS, 53)
            # After the question: a pointer to the name, type, class, TTL and two lengths.
            return answer[len(query) + 13 :].decode()
    raise AssertionError("the resolver doesn't answer")


class Dhcp:
    """A DHCP client (RFC 2131) as far as it needs to be."""

    def __init__(self, lab: Lab, client: str) -> None:
        self._mac = bytes.fromhex(mac(lab, client).replace(":", ""))
        with namespaces.inside(lab.namespace(client)):
            self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, RADIO.encode())
        self.socket.bind(("", 68))
        self.socket.settimeout(RETRY_S)

    def ask(
        self, kind: int, to: str = "255.255.255.255", have: str = "", **options: str
    ) -> tuple[int, str, str]:
        """Send a message; the answer's type, address and domain name."""
        message = BOOTP.pack(
            1, 1, 6, 0, TRANSACTION, 0, 0 if have else 0x8000,
            _packed(have), bytes(4), bytes(4), bytes(4), self._mac, MAGIC,
        )  # fmt: skip
        message += bytes((MESSAGE_TYPE, 1, kind))
        for option, value in ((REQUESTED, "requested"), (SERVER_ID, "server")):
            if value in options:
                message += bytes((option, 4)) + _packed(options[value])
        for _ in range(RETRIES):
            self.socket.sendto(message + bytes((END,)), (to, 67))
            with contextlib.suppress(TimeoutError):
                return _read_dhcp(self.socket.recv(1500))
        raise AssertionError("the DHCP server doesn't answer")


def _packed(at: str) -> bytes:
    return IPv4Address(at or 0).packed


def _read_dhcp(answer: bytes) -> tuple[int, str, str]:
    yours = BOOTP.unpack_from(answer)[8]
    options, rest = {}, answer[BOOTP.size :]
    while rest[0] != END:
        options[rest[0]] = rest[2 : 2 + rest[1]]
        rest = rest[2 + rest[1] :]
    domain_name = options[DOMAIN_NAME].rstrip(b"\0").decode()
    return options[MESSAGE_TYPE][0], str(IPv4Address(yours)), domain_name


def test_ping_and_dns_are_answered_by_the_serving_ap(domain: Lab) -> None:
    with udp(domain, "client1") as client:
        for ap in PATH:
            roam(domain, "client1", ap)
            assert ping(domain, "client1", GATEWAY_ADDRESS, count=3)[0] == 3
            assert ask_dns(client) == ap


def test_a_socket_that_is_anchored_elsewhere_reaches_the_serving_aps_resolver(domain: Lab) -> None:
    """The socket's mapping holds for the Internet; the gateway's address is on every AP."""
    roam(domain, "client1", "ap1")
    with udp(domain, "client1") as client, udp(domain, "server", SERVER, 0) as server:
        client.sendto(b"hello", server.getsockname())
        _, source = server.recvfrom(100)
        assert source[0] == uplink("ap1")
        known_everywhere(domain, "--client", address(domain, "client1"))
        for ap in ("ap2", "ap3"):
            roam(domain, "client1", ap)
            # A firewall that takes in only what conntrack has seen takes this in too.
            domain.run(ap, ["nft", FIREWALL])
            assert ask_dns(client) == ap
            domain.run(ap, ["nft", "delete table inet strict"])
            client.sendto(b"hello", server.getsockname())
            assert server.recvfrom(100)[1] == source


FIREWALL = """
table inet strict {
    chain input {
        type filter hook input priority filter; policy accept;
        iifname "br-lan" ct state untracked drop
    }
}
"""


def test_a_tcp_connection_to_the_gateway_is_nobodys_session(domain: Lab) -> None:
    """It ends where its AP is out of reach; the next one is the new AP's."""
    roam(domain, "client1", "ap1")
    with listening(domain, "ap1", GATEWAY_ADDRESS, 8000) as listener:
        with tcp(domain, "client1", (GATEWAY_ADDRESS, 8000)) as one:
            other, source = accepted(listener)
            with other:
                assert source[0] == address(domain, "client1")
                exchange(one, other)
                assert not any(flow.remote == GATEWAY_ADDRESS for flow in flows(domain, "ap2"))
                assert tracked(domain, "ap1", "client1")
        roam(domain, "client1", "ap2")
        with pytest.raises(ConnectionRefusedError), tcp(domain, "client1", (GATEWAY_ADDRESS, 8000)):
            pass


def test_dhcp_is_answered_by_the_serving_ap(domain: Lab) -> None:
    dhcp = Dhcp(domain, "client1")
    with dhcp.socket:
        roam(domain, "client1", "ap1")
        kind, offered, by = dhcp.ask(DISCOVER)
        assert (kind, by) == (OFFER, "ap1.lab")
        request = {"requested": offered, "server": GATEWAY_ADDRESS}
        assert dhcp.ask(REQUEST, **request) == (ACK, offered, "ap1.lab")
        domain.run("client1", ["ip", "address", "add", f"{offered}/16", "dev", RADIO])
        for ap in ("ap2", "ap3", "ap1"):
            roam(domain, "client1", ap)
            renewed = dhcp.ask(REQUEST, to=GATEWAY_ADDRESS, have=offered)
            assert renewed == (ACK, offered, f"{ap}.lab")
            assert dhcp.ask(DISCOVER)[2] == f"{ap}.lab"
