"""A lab with the real agents in it."""

from __future__ import annotations

import json
import signal
import socket
import time
from typing import Any

import pytest

from apagent.lab import namespaces
from apagent.lab.lab import Lab
from apagent.lab.plan import SERVER_ADDRESS
from apagent.lab.status import inspect

pytestmark = pytest.mark.netns

TIMEOUT_S = 10.0


@pytest.fixture(scope="module")
def domain(module_lab: Any) -> Lab:
    made: Lab = module_lab(aps=3, clients=2)
    return made


def test_every_agent_is_in_sync_and_answers(domain: Lab) -> None:
    status = inspect(domain)
    assert status["state"] == "up"
    for node in status["nodes"]:
        if node["kind"] == "ap":
            agent = node["agent"]
            assert agent is not None
            assert (agent["alive"], agent["in_sync"]) == (True, True)
            assert domain.apctl(node["node"], "status")["ap"] == node["node"]


def test_apctl_works_as_in_the_documentation(domain: Lab) -> None:
    answer = domain.run("ap1", ["apctl", "status", "-o", "json"]).stdout
    assert json.loads(answer)["ap"] == "ap1"


def test_a_connection_survives_a_roam(domain: Lab) -> None:
    with namespaces.inside(domain.namespace("server")):
        listener = socket.create_server((str(SERVER_ADDRESS), 0))
    with namespaces.inside(domain.namespace("client1")):
        client = socket.socket()
    with listener, client, domain.watch_for_leaks() as leaks:
        listener.settimeout(TIMEOUT_S)
        client.settimeout(TIMEOUT_S)
        client.connect(listener.getsockname())
        server, (address, _) = listener.accept()
        with server:
            server.settimeout(TIMEOUT_S)
            assert address == "203.0.113.11"
            for ap in ("ap2", "ap3", "ap1"):
                wait_until_known_everywhere(domain)
                domain.roam("client1", ap)
                client.send(ap.encode())
                assert server.recv(100) == ap.encode()
                server.send(b"thanks")
                assert client.recv(100) == b"thanks"
    assert leaks.packets() == []


def wait_until_known_everywhere(lab: Lab) -> None:
    """Sessions have to be on every AP before a client roams: that takes some milliseconds."""
    deadline = time.monotonic() + TIMEOUT_S
    while not all(lab.apctl(ap, "flows", "--client", "10.77.1.1") for ap in lab.aps):
        assert time.monotonic() < deadline


def test_an_agent_is_killed_and_started_again(domain: Lab) -> None:
    for number in (signal.SIGKILL, signal.SIGTERM):
        before = domain.agent_pid("ap2")
        domain.kill_agent("ap2", number)
        domain.start_agent("ap2")
        assert domain.agent_pid("ap2") != before
        assert domain.apctl("ap2", "status")["in_sync"]
