"""What a script's steps do to the world: a word, up to three numbers, each taken modulo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ipaddress import IPv4Address
from random import Random
from typing import TypeVar

from apagent.core.domain import Forward, Network
from apagent.core.events import ClientSeen, DrainRequested, ReclaimRequested, Source
from apagent.core.model import TCP, Flow, SocketKey, Translation
from tests.simulation.clients import MAX_TALKS, REMOTES, Client, Talk
from tests.simulation.node import Node
from tests.simulation.packets import Fate, answered, be_heard, deliver, reaches, send
from tests.simulation.scenario import Step, Violation
from tests.simulation.streams import Subscription
from tests.simulation.world import World

T = TypeVar("T")
Action = Callable[[World, int, int, int], None]
ACTIONS: dict[str, Action] = {}

CLOCK_JUMPS_S = (0.05, -0.05, 1.0, -1.0, 3600.0, -3600.0, 1e9, -1e9)


def do(world: World, step: Step) -> None:
    """Carry one step out. Raises Violation."""
    world.tell(f"--- {step}")
    ACTIONS[step.action](world, step.a, step.b, step.c)


def _action(function: Action) -> Action:
    ACTIONS[function.__name__] = function
    return function


def _pick(things: Sequence[T], index: int) -> T:
    return things[index % len(things)]


def _node(world: World, index: int) -> Node:
    return _pick(list(world.nodes.values()), index)


def _feed(world: World, reader: int, writer: int) -> Subscription:
    one, others = _node(world, reader), list(world.nodes)
    others.remove(one.id)
    return world.feeds[one.id, _pick(others, writer)]


# --- time


@_action
def run(world: World, percent: int, seed: int, milliseconds: int) -> None:
    """Time passes; that much of what waits is worked off, in an order by `seed`."""
    world.advance(milliseconds / 1000)
    world.sweep(Random(seed), percent / 100)


@_action
def clock(world: World, ap: int, jump: int, _: int) -> None:
    """An AP's clock jumps, forwards or back."""
    _node(world, ap).offset += _pick(CLOCK_JUMPS_S, jump)


# --- clients


@_action
def roam(world: World, who: int, ap: int, how: int) -> None:
    """A client associates with an AP, where it may announce itself, ask by ARP, or speak."""
    client, node = _pick(world.clients, who), _node(world, ap)
    client.at = node.id
    if not node.powered:
        return
    if how & 1:
        node.kernel.bridge.learn(client.network, client.mac)
    if how & 2:
        node.kernel.answer(client)
    if how & 4:
        be_heard(node, client)


@_action
def leave(world: World, who: int, _: int, __: int) -> None:
    """A client goes away, or out of reach on its way."""
    _pick(world.clients, who).at = None


@_action
def arp(world: World, who: int, _: int, __: int) -> None:
    """A client asks for its gateway by ARP."""
    client = _pick(world.clients, who)
    if client.at is not None and world.nodes[client.at].powered:
        world.nodes[client.at].kernel.answer(client)


@_action
def readdress(world: World, who: int, which: int, how: int) -> None:
    """A client gets another address, maybe one that another client had; or an idle one's."""
    client = _pick(world.clients, who)
    free = world.free[client.network]
    if free:
        address = free.pop(which % len(free))
        free.append(client.address)
        client.address = address
        client.talks.clear()
        world.users.setdefault((client.network, address), set()).add(client.mac)
        if how & 1:
            arp(world, who, 0, 0)


@_action
def late(world: World, who: int, ap: int, source: int) -> None:
    """An AP where the client isn't takes it for present: a frame from a queue, a stale entry."""
    client, node = _pick(world.clients, who), _node(world, ap)
    bridge = node.kernel.bridge
    if not node.powered or node.id == client.at:
        return
    match source % 3:
        case 0:
            bridge.learn(client.network, client.mac)
        case 1:
            be_heard(node, client)
        case 2:
            node.kernel.answer(client)


@_action
def repeat(world: World, who: int, source: int, _: int) -> None:
    """The AP where a client is sees it once more."""
    client = _pick(world.clients, who)
    if client.at is not None and world.nodes[client.at].powered:
        address = client.address if source % 4 else None
        seen = ClientSeen(client.network, client.mac, _pick(list(Source), source), address)
        bridge = world.nodes[client.at].kernel.bridge
        bridge.learn(client.network, client.mac)
        bridge.report(seen)


@_action
def age(world: World, who: int, ap: int, _: int) -> None:
    """A bridge forgets a client that it hasn't heard for long."""
    client = _pick(world.clients, who)
    _node(world, ap).kernel.bridge.age(client.network, client.mac)


# --- flows


@_action
def open(world: World, who: int, kind: int, remote: int) -> None:  # noqa: A001
    """A client opens a flow."""
    client = _pick(world.clients, who)
    key = client.new_flow(kind, remote)
    if key is not None and client.talk(key) is None and len(client.talks) < MAX_TALKS:
        talk = Talk(key, contested=world.anchors_of(client.network, key) > 0)
        client.talks.append(talk)
        speak(world, client, talk)


@_action
def say(world: World, who: int, which: int, _: int) -> None:
    """A client sends a packet of a flow that it has."""
    client = _pick(world.clients, who)
    if client.talks:
        speak(world, client, _pick(client.talks, which))


@_action
def close(world: World, who: int, which: int, _: int) -> None:
    """A client closes a flow, and its anchor sees that."""
    client = _pick(world.clients, who)
    if client.talks:
        talk = _pick(client.talks, which)
        sent = speak(world, client, talk)
        if talk in client.talks:
            client.end(talk)
        if sent is Fate.TRANSLATED:
            for node in world.nodes.values():
                node.kernel.conntrack.close(client.network, talk.key)


@_action
def expire(world: World, ap: int, which: int, _: int) -> None:
    """A conntrack entry's time is over."""
    conntrack = _node(world, ap).kernel.conntrack
    entries = [(name, key) for name, table in conntrack.tables.items() for key in table]
    if entries:
        conntrack.close(*_pick(entries, which))


@_action
def call(world: World, which: int, remote: int, _: int) -> None:
    """Somebody outside calls a forwarded port, and the client answers."""
    forwards = [
        (node, network, forward)
        for node in world.nodes.values()
        for network in node.domain.networks
        for forward in network.forwards
    ]
    if not forwards:
        return
    home, network, forward = _pick(forwards, which)
    server = [c for c in world.clients if (c.network, c.address) == (network.name, forward.client)]
    address = network.nat_address or home.kernel.address
    node = _forwarder(world, home, network, forward.outside(address))
    if node is not None and server:
        _call(world, node, forward, address, server[0], remote)


def _forwarder(world: World, home: Node, network: Network, outside: SocketKey) -> Node | None:
    """The AP that lets in what comes to a forwarded port now."""
    if not network.lets_forwards_move:
        return home if home.powered else None
    there = [
        node
        for node in world.nodes.values()
        if node.powered and node.kernel.has(network.nat_address or home.kernel.address)
    ]
    found = there[0].kernel.installed[network.name].forwards if len(there) == 1 else {}
    return there[0] if outside in found else None


def _call(
    world: World, node: Node, forward: Forward, address: IPv4Address, client: Client, remote: int
) -> None:
    to = _pick(REMOTES, remote)
    key = Flow(forward.protocol, forward.client, forward.client_port, to, 50000 + remote % 8).key
    entry = node.kernel.conntrack.tables[client.network].get(key)
    if entry is None:
        made = Translation(address, forward.port)
        entry = node.kernel.conntrack.open(client.network, key, client.mac, made)
        world.opened(node, client.network, key)
    if not reaches(world, node.id, client):
        return
    if client.talk(key) is None and len(client.talks) < MAX_TALKS:
        contested = world.anchors_of(client.network, key) > 1
        client.talks.append(Talk(key, entry.nat, contested=contested))
    send(world, client, key, opens=forward.protocol != TCP)


def speak(world: World, client: Client, talk: Talk) -> Fate:
    """Send one packet of a flow. Raises Violation if the server would see it come from elsewhere.

    A connection is open once an answer has reached the client: until then it repeats its SYN.
    """
    sent = send(world, client, talk.key, opens=talk.nat is None)
    world.tell(f"{client.mac} at {client.at}: {Flow.of(talk.key)} {sent.fate} by {sent.anchor}")
    if sent.fate is Fate.RESET:
        client.end(talk)
    talk.contested |= world.anchors_of(client.network, talk.key) > 1
    if sent.entry is None or sent.anchor is None or talk.protocol != TCP:
        return sent.fate
    if talk.nat not in (None, sent.entry.nat) and not talk.contested:
        raise Violation(f"{Flow.of(talk.key)} is seen to come from two addresses")
    if answered(world, sent.entry, client, talk.key):
        talk.nat = sent.entry.nat
    return sent.fate


@_action
def answer(world: World, ap: int, which: int, _: int) -> None:
    """A server's packet comes to an AP for one of its flows."""
    node = _node(world, ap)
    keys = [(n, key) for n, table in node.kernel.conntrack.tables.items() for key in table]
    if node.powered and keys:
        network, key = _pick(keys, which)
        deliver(world, node, network, Flow.of(key).client)


# --- feeds and tunnels


@_action
def stall(world: World, reader: int, writer: int, on: int) -> None:
    """A feed stands still, or goes on."""
    _feed(world, reader, writer).stalled = bool(on & 1)


@_action
def snap(world: World, reader: int, writer: int, _: int) -> None:
    """A feed breaks."""
    feed = _feed(world, reader, writer)
    if feed.reader.agent is not None:
        world.batch(feed.reader, lambda: feed.reader.work_off(feed.lose()))


@_action
def cut(world: World, reader: int, writer: int, on: int) -> None:
    """An AP can't reach another one's feed, or can again; the other direction is as it was."""
    _feed(world, reader, writer).cut = bool(on & 1)


@_action
def isolate(world: World, ap: int, on: int, _: int) -> None:
    """An AP is cut off from all feeds, in both directions, or back."""
    node = _node(world, ap)
    for pair, feed in world.feeds.items():
        if node.id in pair:
            feed.cut = bool(on & 1)


@_action
def tunnel(world: World, one: int, other: int, on: int) -> None:
    """No packet passes between two APs, or they do again; their feeds are as they were."""
    feed = _feed(world, one, other)
    pair = frozenset({feed.reader.id, feed.writer.id})
    (world.cut_tunnels.add if on & 1 else world.cut_tunnels.discard)(pair)


# --- agents


@_action
def lose(world: World, ap: int, what: int, _: int) -> None:
    """The kernel had more events than its socket's buffer holds."""
    node = _node(world, ap)
    if what & 1:
        node.kernel.conntrack.overflow()
    else:
        world.batch(node, node.list_clients) if node.agent is not None else None


@_action
def kill(world: World, ap: int, _: int, __: int) -> None:
    """An agent dies."""
    world.stop(_node(world, ap))


@_action
def crash(world: World, ap: int, after: int, _: int) -> None:
    """An agent will die within its next batch: before the kernel has it, or after some effects."""
    node = _node(world, ap)
    if node.agent is not None:
        node.crash_after = after % 4


@_action
def start(world: World, ap: int, _: int, __: int) -> None:
    """An agent is started, if it doesn't run."""
    world.start(_node(world, ap))


@_action
def restart(world: World, ap: int, _: int, __: int) -> None:
    """An agent dies and is started at once."""
    kill(world, ap, 0, 0)
    start(world, ap, 0, 0)


@_action
def reboot(world: World, ap: int, on: int, _: int) -> None:
    """An AP loses its power, and comes back later or at once; its clients hear it come back."""
    node = _node(world, ap)
    world.reboot(node)
    for client in world.clients:
        if client.at == node.id:
            client.at = None
    if on & 1:
        world.start(node)


@_action
def timeout(world: World, ap: int, _: int, __: int) -> None:
    """An agent waits no longer for silent peers."""
    node = _node(world, ap)
    world.batch(node, node.time_out) if node.agent is not None else None


# --- anchors


@_action
def uplink(world: World, ap: int, on: int, _: int) -> None:
    """An AP's uplink breaks, or works again."""
    _node(world, ap).kernel.uplink_works = not on & 1


@_action
def drain(world: World, ap: int, on: int, _: int) -> None:
    """An operator wants an AP to anchor nothing, or to anchor again."""
    node = _node(world, ap)
    if node.agent is not None:
        node.agent.draining = bool(on & 1)
        world.batch(node, lambda: node.work_off([DrainRequested(bool(on & 1))]))


@_action
def reclaim(world: World, ap: int, _: int, __: int) -> None:
    """An operator wants an AP's own addresses back."""
    node = _node(world, ap)
    if node.agent is not None:
        world.batch(node, lambda: node.work_off([ReclaimRequested()]))
