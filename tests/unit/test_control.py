"""The management service over its unix socket, with a fake agent behind it."""

from __future__ import annotations

import asyncio
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from apagent.control.notation import parse_client, parse_mac
from apagent.control.server import ControlServer
from apagent.control.views import AgentEventView
from apagent.control.watch import WatchQueue
from apagent.errors import NeedsError
from apagent.v1 import control_pb2 as pb
from apagent.v1 import control_pb2_grpc
from tests.fakes.control import CLIENT, FLOWS, FakeBackend

PATIENCE_S = 10.0


@asynccontextmanager
async def served(path: Path, backend: FakeBackend) -> AsyncIterator[Any]:
    """A stub of a running service."""
    server = ControlServer(backend, path)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
            yield control_pb2_grpc.ControlStub(channel)
    finally:
        await server.stop()


def call(path: Path, ask: Callable[[Any], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        async with served(path, FakeBackend()) as stub, asyncio.timeout(PATIENCE_S):
            return await ask(stub)

    return asyncio.run(main())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "control.sock"


def event(n: int) -> AgentEventView:
    return AgentEventView(float(n), "roam", f"event {n}", {"n": str(n)})


def test_answers_hold_what_the_backend_says(path: Path) -> None:
    async def ask(stub: Any) -> None:
        status = await stub.GetStatus(pb.GetStatusRequest())
        assert status.peer_sessions == 1 << 40
        assert status.networks[0].client_interface == "br-lan"
        assert (await stub.ListPeers(pb.ListPeersRequest())).peers[0].epoch == (1 << 56) - 1
        client = (await stub.ListClients(pb.ListClientsRequest())).clients[0]
        assert dict(client.flows_by_anchor) == {"ap1": 2, "ap2": 1}
        assert client.roams[0].from_ap == "ap2"

    call(path, ask)


@pytest.mark.parametrize(
    "text",
    ["10.77.0.5", "02:00:5E:10:00:01", "02-00-5e-10-00-01", "0200.5e10.0001", "02005e100001"],
)
def test_a_client_is_found_by_any_notation(path: Path, text: str) -> None:
    got = call(path, lambda stub: stub.GetClient(pb.GetClientRequest(client=text)))
    assert got.mac == CLIENT.mac


async def flows(stub: Any, **filters: str) -> list[str]:
    parts = stub.ListFlows(pb.ListFlowsRequest(**filters))
    return [flow.protocol async for part in parts for flow in part.flows]


@pytest.mark.parametrize(
    ("filters", "protocols"),
    [
        ({}, ["tcp", "icmp"]),
        ({"client": "10.77.0.5"}, ["tcp", "icmp"]),
        ({"anchor": "ap2"}, ["tcp"]),
        ({"protocol": "ICMP"}, ["icmp"]),
        ({"protocol": "udp"}, []),
    ],
)
def test_flows_are_filtered(path: Path, filters: dict[str, str], protocols: list[str]) -> None:
    assert call(path, lambda stub: flows(stub, **filters)) == protocols


def test_many_flows_come_in_parts(path: Path) -> None:
    backend = FakeBackend()
    backend.all_flows = FLOWS * 300

    async def main() -> list[int]:
        async with served(path, backend) as stub, asyncio.timeout(PATIENCE_S):
            return [len(p.flows) async for p in stub.ListFlows(pb.ListFlowsRequest())]

    assert asyncio.run(main()) == [256, 256, 88]


NOT_FOUND, INVALID = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("ask", "status", "says"),
    [
        (lambda s: s.GetClient(pb.GetClientRequest(client="10.77.0.9")), NOT_FOUND, "10.77.0.9"),
        (lambda s: flows(s, client="10.77.0.9"), NOT_FOUND, "10.77.0.9"),
        (lambda s: s.GetClient(pb.GetClientRequest(client="x")), INVALID, "neither a MAC"),
        (lambda s: flows(s, protocol="gre"), INVALID, "icmp, tcp, udp"),
        (lambda s: s.Associate(pb.AssociateRequest(mac="10.77.0.5")), INVALID, "no MAC"),
        (
            lambda s: s.Associate(pb.AssociateRequest(mac=CLIENT.mac, address="10.77")),
            INVALID,
            "no IPv4",
        ),
        (
            lambda s: s.Associate(pb.AssociateRequest(mac=CLIENT.mac, network="guest")),
            INVALID,
            "there is: lan",
        ),
    ],
)
def test_refusals_have_a_status_and_a_text(
    path: Path, ask: Callable[[Any], Awaitable[Any]], status: grpc.StatusCode, says: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=says) as caught:
        call(path, ask)
    assert caught.value.code() is status


def test_a_watcher_gets_events_from_now_on_and_leaves_nothing_behind(path: Path) -> None:
    async def main() -> None:
        backend = FakeBackend()
        async with served(path, backend) as stub, asyncio.timeout(PATIENCE_S):
            watch = stub.Watch(pb.WatchEventsRequest(flows=True))
            await watch.initial_metadata()
            ((callback, with_flows),) = backend.watchers
            assert with_flows
            callback(event(1))
            got = await watch.read()
            assert (got.time, got.kind, dict(got.fields)) == (1.0, "roam", {"n": "1"})
            watch.cancel()
            while backend.watchers:  # noqa: ASYNC110 - no event tells of it
                await asyncio.sleep(0)

    asyncio.run(main())


def test_a_slow_watcher_is_told_what_it_missed() -> None:
    async def main() -> None:
        queue = WatchQueue(size=2)
        for n in range(5):
            queue.put(event(n))
        assert [await queue.get() for _ in range(2)] == [event(0), event(1)]
        queue.put(event(5))
        dropped = await queue.get()
        assert (dropped.kind, dropped.fields, dropped.time) == ("dropped", {"count": "3"}, 4.0)
        assert await queue.get() == event(5)

    asyncio.run(main())


def test_what_a_watcher_missed_last_is_told_too() -> None:
    async def main() -> None:
        queue = WatchQueue(size=1)
        queue.put(event(0))
        queue.put(event(1))
        assert await queue.get() == event(0)
        assert (await queue.get()).fields == {"count": "1"}
        waiting = asyncio.create_task(queue.get(), name="waits")
        queue.put(event(2))
        assert await waiting == event(2)

    asyncio.run(main())


def test_only_the_owner_may_use_the_socket_and_it_goes_with_the_server(path: Path) -> None:
    def modes() -> list[int]:
        return [stat.S_IMODE(at.stat().st_mode) for at in (path, path.parent)]

    async def look(_stub: Any) -> list[int]:
        return modes()

    assert call(path, look) == [0o600, 0o755]
    assert not path.exists()


def test_a_dead_agents_socket_is_replaced(path: Path) -> None:
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert call(path, lambda stub: stub.GetStatus(pb.GetStatusRequest())).ap == "ap1"


def test_a_living_agents_socket_is_left_alone(path: Path) -> None:
    async def main() -> None:
        async with served(path, FakeBackend()) as stub:
            second = ControlServer(FakeBackend(), path)
            with pytest.raises(NeedsError, match=r"control\.socket: another agent answers"):
                await second.start()
            await second.stop()
            assert (await stub.GetStatus(pb.GetStatusRequest())).ap == "ap1"

    asyncio.run(main())


def test_a_file_in_the_sockets_place_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("precious")
    with pytest.raises(NeedsError, match=r"control\.socket: .* no socket: move it away"):
        call(path, lambda stub: stub.GetStatus(pb.GetStatusRequest()))
    assert path.read_text() == "precious"


def test_a_path_too_long_for_a_socket_is_named(tmp_path: Path) -> None:
    with pytest.raises(NeedsError, match=r"control\.socket: "):
        call(tmp_path / ("x" * 120), lambda stub: stub.GetStatus(pb.GetStatusRequest()))


@pytest.mark.parametrize("text", ["", "12", "aa:bb:cc:dd:ee", "10.77.0", "10.77.0.256", "fe80::1"])
def test_what_names_no_client(text: str) -> None:
    with pytest.raises(ValueError, match=r"neither|no IPv4"):
        parse_client(text)


def test_a_group_address_is_nobodys() -> None:
    with pytest.raises(ValueError, match="group address"):
        parse_mac("01:00:5e:00:00:01")
    with pytest.raises(ValueError, match="no client's"):
        parse_mac("00:00:00:00:00:00")
