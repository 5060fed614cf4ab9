"""The composition root: every adapter, server and task of the agent is made here, top to bottom."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import logging
import os
import signal
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any

from apagent import __version__
from apagent.agent import Agent
from apagent.anchor_work import AnchorWork
from apagent.config import Config
from apagent.control.backend import EngineBackend
from apagent.control.probe import ControlProbe
from apagent.control.server import ControlServer
from apagent.core.domain import VXLAN_OVERHEAD, Domain
from apagent.core.effects import Effect
from apagent.core.engine import Engine
from apagent.core.events import Event
from apagent.core.feed import FeedContents, FeedLog
from apagent.errors import NeedsError
from apagent.kernel.address_watch import LinuxAddressWatch
from apagent.kernel.clients import LinuxClientMonitor
from apagent.kernel.conntrack import LinuxFlowMonitor
from apagent.kernel.linux import LinuxDataPath
from apagent.kernel.needs import underlay_mtu
from apagent.kernel.port import DataPath
from apagent.kernel.probes import LinuxTunnelProber
from apagent.kernel.uplinks import LinuxUplinkProber
from apagent.notify import notify, watchdog_period_s
from apagent.peers.client import PeerSubscription
from apagent.peers.follower import Follower
from apagent.peers.server import PeerFeedServer
from apagent.reconcile import Reconciler
from apagent.shell import Shell
from apagent.watchdog import Check, OwnEnd, ServiceManager, Supervision, status_line

log = logging.getLogger(__name__)

YOUNG_OBJECTS = 20_000
"""Container objects that are made (less those that have gone) before garbage is looked for."""


def find_domain(config: Config, kernel: DataPath) -> Domain:
    """The roam domain on this machine. Raises NeedsError with all that is missing."""
    missing = kernel.missing_needs(config.domain({}, 1500 - VXLAN_OVERHEAD))
    if missing:
        raise NeedsError("\n".join(missing))
    mtu = underlay_mtu(config.tunnel.underlay) - VXLAN_OVERHEAD
    return config.domain(kernel.anchor_numbers(config.kernel.table), mtu)


def known_domain(config: Config, kernel: DataPath) -> Domain:
    """The roam domain without asking whether this machine could run it."""
    return config.domain(kernel.anchor_numbers(config.kernel.table), 1500 - VXLAN_OVERHEAD)


async def run(config: Config) -> None:
    """Run the agent until SIGTERM or SIGINT. Raises NeedsError, KernelFault."""
    log.info("apagent %s starts as %s", __version__, config.ap)
    later = asyncio.get_running_loop().call_later
    kernel = LinuxDataPath(later)
    domain = find_domain(config, kernel)
    sysctls = kernel.prepare(domain).sysctls
    for line in sysctls:
        log.info("changed sysctl %s", line)

    engine = Engine(domain)
    feed = FeedLog(int.from_bytes(os.urandom(7), "big"), lambda: _contents(engine))
    reconciler = Reconciler(kernel, domain, engine)
    flows = LinuxFlowMonitor(domain.networks)
    shell = Shell(engine, kernel, flows, reconciler, feed, later)
    shell.observers.append(_Readiness(engine))
    work = AnchorWork(
        engine.peers,
        shell.emit,
        later,
        tunnel=LinuxTunnelProber(domain),
        uplinks=LinuxUplinkProber(domain.networks),
        segment=LinuxAddressWatch(network for network in domain.networks if network.takeover),
        flows=flows,
        kernel=kernel,
        spared=engine.idle_peers,
    )
    shell.carry_further = work.carry_out
    agent = Agent(
        engine,
        shell,
        reconciler,
        kernel,
        flows,
        LinuxClientMonitor(domain),
        kernel.watch(),
    )
    subscriptions = [
        PeerSubscription(
            config.ap,
            peer.address,
            Follower(peer.id, domain.networks, engine.sessions),
            shell.emit,
        )
        for peer in config.peers
    ]
    backend = EngineBackend(engine, shell, agent, reconciler, kernel, subscriptions, sysctls)
    peer_server = PeerFeedServer(config.ap, feed, config.listen)
    control_server = ControlServer(backend, config.socket)

    _spare_the_collector()
    agent.adopt()
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(agent.close)
        await control_server.start()
        stack.push_async_callback(control_server.stop)
        await peer_server.start()
        stack.push_async_callback(peer_server.stop)
        for subscription in subscriptions:
            await stack.enter_async_context(
                _task(subscription.run(), f"feed of {subscription.follower.peer}")
            )
        agent.listen(config.sync_timeout_s)
        stack.callback(work.close)
        work.start(asyncio.get_running_loop())
        await _supervise(stack, config, backend, kernel, peer_server, subscriptions)
        log.info("listening for peers at %s, for apctl at %s", config.listen, config.socket)
        await _stop_signal()
        log.info("stopping; forwarding goes on, `apagent cleanup` removes it")
        notify("STOPPING=1")


async def _supervise(
    stack: contextlib.AsyncExitStack,
    config: Config,
    backend: EngineBackend,
    kernel: DataPath,
    peer_server: PeerFeedServer,
    subscriptions: Sequence[PeerSubscription],
) -> None:
    """Tell the service manager that we live and how we are, if there is one."""
    period_s = watchdog_period_s(os.environ, os.getpid())
    managed = "NOTIFY_SOCKET" in os.environ
    if not managed and period_s is None:
        return
    faulthandler.enable()
    probe = ControlProbe(config.socket)
    stack.push_async_callback(probe.close)

    async def ask_kernel() -> None:
        kernel.counters()

    def status() -> str:
        view = backend.status()
        return status_line(view.degraded, in_sync=view.in_sync)

    checks: dict[str, Check] = {
        "kernel": ask_kernel,
        "management service": probe.check,
        "feed server": peer_server.check,
        **{f"feed of {each.follower.peer}": each.check for each in subscriptions},
    }
    manager = ServiceManager(notify) if managed else OwnEnd(period_s or 0.0)
    clock = asyncio.get_running_loop().time
    supervision = Supervision(manager, period_s, checks, status, clock)
    await stack.enter_async_context(_task(supervision.run(), "supervision"))


def _spare_the_collector() -> None:
    """Have Python's garbage collector look at what is new, and seldom.

    What is there by now stays: a walk through it takes 10 ms, in which nothing else gets on.
    Sessions are bytes in dictionaries, which it doesn't look at, but a start makes millions of
    tuples that live for a moment: with a million sessions it would take a second of it.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 10, 10)


def _contents(engine: Engine) -> FeedContents:
    tables, claims = engine.snapshot()
    anchor = engine.anchoring.book.statement()
    return FeedContents(tables, claims, engine.clock, anchor, engine.digests(engine.me))


class _Readiness:
    """Tells the service manager once that clients may come."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._told = False

    def __call__(self, _event: Event, _effects: list[Effect]) -> None:
        if not self._told and self._engine.is_ready:
            self._told = True
            notify("READY=1")


@contextlib.asynccontextmanager
async def _task(work: Coroutine[Any, Any, None], name: str) -> AsyncIterator[None]:
    """Run `work` as a named task for the length of the block; its failure ends the process."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_fail_loudly)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _fail_loudly(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.critical("task %r failed", task.get_name(), exc_info=task.exception())
        os.kill(os.getpid(), signal.SIGTERM)


async def _stop_signal() -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    await stopped.wait()
