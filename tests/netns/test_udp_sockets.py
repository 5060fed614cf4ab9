"""A client's UDP socket has one public address and port, wherever its client roams.

Endpoint-independent mapping (RFC 4787, section 4.1), as a STUN client finds it out (RFC 5780,
section 4.3): the servers at two addresses and three ports tell each where it comes from.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from apagent.lab.lab import Lab
from tests.netns.conftest import MakeLab
from tests.netns.nat_support import (
    SECOND_SERVER,
    Address,
    flows,
    forget_flows,
    known_everywhere,
    roam,
    set_timeouts,
    udp,
)
from tests.netns.observe import SERVER, becomes, uplink

pytestmark = pytest.mark.netns

SERVERS: tuple[Address, ...] = (
    (SERVER, 3478),
    (SECOND_SERVER, 3478),
    (SERVER, 3479),
    (SECOND_SERVER, 3479),
    (SERVER, 3480),
    (SECOND_SERVER, 3480),
)
RETRIES, RETRY_S = 10, 0.1
LONG_S, SHORT_S = 120, 1
TIMEOUTS = ("udp_timeout", "udp_timeout_stream")


@pytest.fixture(scope="module")
def domain(module_lab: MakeLab) -> Iterator[Lab]:
    made = module_lab(aps=3, clients=1)
    with contextlib.ExitStack() as stack:
        for server in SERVERS:
            stack.enter_context(_answering(stack.enter_context(udp(made, "server", *server))))
        yield made


@contextlib.contextmanager
def _answering(server: socket.socket) -> Iterator[None]:
    """Tell everybody who asks where the question came from."""
    server.settimeout(0.1)
    ended = threading.Event()

    def serve() -> None:
        while not ended.is_set():
            with contextlib.suppress(TimeoutError):
                _, source = server.recvfrom(100)
                server.sendto(f"{source[0]} {source[1]}".encode(), source)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.fixture(autouse=True)
def _at_ap1(domain: Lab) -> None:
    roam(domain, "client1", "ap1")
    set_timeouts(domain, LONG_S, *TIMEOUTS)
    forget_flows(domain)


def mapped(client: socket.socket, server: Address) -> Address:
    """The socket's public address and port as a server sees them; only that server may answer.

    Asked again as STUN does (RFC 8489, section 6.2.1): until the anchor knows where its client is,
    an answer may go where it was.
    """
    client.settimeout(RETRY_S)
    for _ in range(RETRIES):
        client.sendto(b"who am I?", server)
        with contextlib.suppress(TimeoutError):
            while True:
                answer, source = client.recvfrom(100)
                if source == server:
                    public, port = answer.decode().split()
                    return public, int(port)
                assert source in SERVERS
    raise AssertionError(f"no answer from {server}")


def test_one_mapping_over_roams_for_servers_old_and_new(domain: Lab) -> None:
    with udp(domain, "client1") as client:
        public = mapped(client, SERVERS[0])
        assert public[0] == uplink("ap1")
        for known, ap in enumerate(("ap2", "ap3", "ap1", "ap3"), start=1):
            known_everywhere(domain, at_least=known)
            domain.roam("client1", ap)
            # One that the socket has not spoken to before comes first: no known flow helps it.
            for server in reversed(SERVERS[: known + 1]):
                assert mapped(client, server) == public
        assert {flow.anchor for flow in flows(domain, "ap3")} == {"ap1"}


def test_a_mapping_that_begins_away_from_home_stays_there(domain: Lab) -> None:
    roam(domain, "client1", "ap3")
    with udp(domain, "client1") as client, udp(domain, "client1") as other:
        public = mapped(client, SERVERS[0])
        assert public[0] == uplink("ap3")
        known_everywhere(domain)
        domain.roam("client1", "ap1")
        assert mapped(client, SERVERS[1]) == public
        # Another socket of the same client is anchored where the client is.
        assert mapped(other, SERVERS[0])[0] == uplink("ap1")


def test_two_sockets_with_mappings_at_two_anchors_keep_them(domain: Lab) -> None:
    with udp(domain, "client1") as first, udp(domain, "client1") as second:
        one = mapped(first, SERVERS[0])
        known_everywhere(domain)
        domain.roam("client1", "ap2")
        two = mapped(second, SERVERS[0])
        assert (one[0], two[0]) == (uplink("ap1"), uplink("ap2"))
        known_everywhere(domain, at_least=2)
        for ap, server in (("ap3", SERVERS[2]), ("ap1", SERVERS[3]), ("ap2", SERVERS[4])):
            domain.roam("client1", ap)
            assert (mapped(first, server), mapped(second, server)) == (one, two)
            known_everywhere(domain, at_least=2)


def test_the_mapping_moves_once_it_has_expired(domain: Lab) -> None:
    set_timeouts(domain, SHORT_S, *TIMEOUTS)
    with udp(domain, "client1") as client:
        assert mapped(client, SERVERS[0])[0] == uplink("ap1")
        known_everywhere(domain)
        domain.roam("client1", "ap2")
        # Each question keeps the mapping alive, to whatever server it goes.
        for server in (*SERVERS, *SERVERS):
            assert mapped(client, server)[0] == uplink("ap1")
            time.sleep(SHORT_S / 5)
        becomes(lambda: [flows(domain, ap) for ap in domain.aps], [set()] * 3)
        assert mapped(client, SERVERS[0])[0] == uplink("ap2")
        assert mapped(client, SERVERS[1])[0] == uplink("ap2")
