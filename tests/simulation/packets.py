"""Where a packet goes, given what the APs' kernels hold: the data path as a few look-ups."""

from __future__ import annotations

from enum import StrEnum
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, NamedTuple

from apagent.core.desired import ANY_ANCHOR, NOBODY
from apagent.core.events import ClientSeen, Source
from apagent.core.model import TCP, ApId, Flow, FlowKey, NetworkName, Translation, socket_of
from apagent.kernel.nft.forwarding import FOLLOW_TTL
from tests.simulation.clients import Client
from tests.simulation.kernel import Entry

if TYPE_CHECKING:
    from tests.simulation.node import Node
    from tests.simulation.world import World

MAX_HOPS = FOLLOW_TTL
"""Tunnels that a packet passes at most: from its second one on its TTL is 3, then 2, then spent."""


class Fate(StrEnum):
    """What became of a client's packet."""

    TRANSLATED = "translated"
    RESET = "reset"
    LOST = "lost"


class Sent(NamedTuple):
    """A client's packet: its fate, and who decided on it with which entry."""

    fate: Fate
    anchor: ApId | None = None
    entry: Entry | None = None


LOST = Sent(Fate.LOST)


def send(world: World, client: Client, key: FlowKey, *, opens: bool) -> Sent:
    """The client sends a packet; `opens`: one that may be a flow's first."""
    if client.at is None or not world.nodes[client.at].powered:
        return LOST
    node = world.nodes[client.at]
    be_heard(node, client)
    state = node.kernel.installed[client.network]
    if state.home.get(client.address) == client.mac:
        return _translate(world, node, client, key, opens=opens)
    anchor = state.flows.get(key) or state.sockets.get(socket_of(key)) or ANY_ANCHOR
    anchor = state.diverted.get(anchor, anchor)
    if anchor in (ANY_ANCHOR, NOBODY, node.id):
        return _translate(world, node, client, key, opens=opens)
    if not world.tunnel(node.id, anchor):
        return LOST
    return _translate(world, world.nodes[anchor], client, key, opens=opens)


def be_heard(node: Node, client: Client) -> None:
    """A packet of the client comes in: what bridge and data trigger make of it."""
    kernel = node.kernel
    kernel.bridge.learn(client.network, client.mac)
    if kernel.installed[client.network].known.get(client.address) != client.mac:
        seen = ClientSeen(client.network, client.mac, Source.DATA, client.address)
        kernel.bridge.report(seen)


def deliver(
    world: World, node: Node, network: NetworkName, address: IPv4Address
) -> tuple[ApId | None, int]:
    """The AP that hands a packet, which is at `node` now, to the client interface; tunnels passed.

    None: the packet is lost.
    """
    hops = 0
    while True:
        state = node.kernel.installed[network]
        via = state.routes.get(address)
        if via is None:
            return node.id, hops
        if hops == MAX_HOPS or not world.tunnel(node.id, via):
            return None, hops
        hops += 1
        node = world.nodes[via]


def answered(world: World, entry: Entry, client: Client, key: FlowKey) -> bool:
    """Whether a server's answer gets to the client: it goes to whoever has the NAT address."""
    address = Translation.of(entry.nat).address
    holders = [n for n in world.nodes.values() if n.powered and n.kernel.has(address)]
    if len(holders) != 1:
        return False
    there = holders[0].kernel.conntrack.tables[client.network].get(key)
    return there is not None and there.nat == entry.nat and reaches(world, holders[0].id, client)


def reaches(world: World, anchor: ApId, client: Client) -> bool:
    """Whether what the anchor has for the client gets there."""
    at, _ = deliver(world, world.nodes[anchor], client.network, client.address)
    if at is None or at != client.at:
        return False
    kernel = world.nodes[at].kernel
    neighbour = kernel.installed[client.network].neighbours.get(client.address)
    if neighbour is None:
        kernel.bridge.resolve(client.network, client.address, client.mac)
    return neighbour in (None, client.mac)


def _translate(world: World, node: Node, client: Client, key: FlowKey, *, opens: bool) -> Sent:
    conntrack = node.kernel.conntrack
    entry = conntrack.tables[client.network].get(key)
    if entry is None:
        if key[8] == TCP and not opens:
            return LOST if _spared(world, node, client) else Sent(Fate.RESET, node.id)
        if key[8] != TCP and world.time < node.kernel.held_until:
            return LOST
        made = Translation(node.kernel.source(client.network), Flow.of(key).client_port)
        entry = conntrack.open(client.network, key, client.mac, made)
        world.opened(node, client.network, key)
    if not node.kernel.uplink_works:
        return LOST
    return Sent(Fate.TRANSLATED, node.id, entry)


def _spared(world: World, node: Node, client: Client) -> bool:
    """Whether a stray is dropped instead of reset: its session may still be on its way here."""
    if node.id != client.at:
        return False
    known = node.kernel.installed[client.network].known.get(client.address)
    arrived = world.time < node.kernel.grace.get((client.network, client.address), 0.0)
    return known != client.mac or arrived
