"""What must hold once everything works again and has come to rest.

Each check computes what should be from what is really so (the conntrack tables, where the clients
are), not by the code that it checks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address

from apagent.core.desired import NetworkState, difference
from apagent.core.digest import digest_of
from apagent.core.domain import Network
from apagent.core.engine import PeerState
from apagent.core.model import (
    TRANSLATION,
    UDP,
    ApId,
    Claim,
    Flow,
    FlowKey,
    Mac,
    Nat,
    NatAddress,
    NetworkName,
    SocketKey,
    Translation,
    client_of,
    is_standing,
    socket_of,
)
from tests.simulation.clients import Client, Talk
from tests.simulation.node import Node, contents
from tests.simulation.packets import Fate, answered, deliver, send
from tests.simulation.scenario import Violation
from tests.simulation.world import World

DIGESTS = 16
"""Buckets of the digests that are compared."""


def must(holds: bool, otherwise: str) -> None:
    """Raises Violation, saying `otherwise`, if something doesn't hold."""
    if not holds:
        raise Violation(otherwise)


def agreement(world: World) -> None:
    """All APs agree with each other, with their kernels, and with conntrack. Raises Violation."""
    for node in world.nodes.values():
        _check_sync(node)
    for network in world.networks:
        tables = {node.id: _own_table(world, node, network.name) for node in world.nodes.values()}
        for node in world.nodes.values():
            _check_tables(node, network.name, tables)
        _check_anchors(tables)
        claims = _check_claims(world, network.name)
        for node in world.nodes.values():
            _check_kernel(world, node, network.name, tables, claims)
        _check_addresses(world, network.name)


def drained(world: World) -> None:
    """What an AP that anchors nothing could hand over it has handed over."""
    for node in world.nodes.values():
        assert node.agent is not None
        for network in node.domain.networks if node.agent.draining else ():
            book = node.engine.anchoring.book
            heirs = [ap for ap in book.statements if book.is_fit(ap, network.name)]
            if network.takeover and heirs:
                held = sorted(node.kernel.installed[network.name].addresses)
                must(not held, f"{node.id} is drained and still holds {held}")


def truth(world: World, clients: Iterable[Client]) -> None:
    """Clients are where they are said to be, and their packets go where they must."""
    for client in clients:
        _check_place(world, client)
        for talk in client.talks:
            _check_talk(world, client, talk)


def emptiness(world: World) -> None:
    """All clients have gone and all flows have ended: nothing is left, anywhere."""
    for node in world.nodes.values():
        for network in node.domain.networks:
            _check_empty(node, network)


def _check_sync(node: Node) -> None:
    engine = node.engine
    must(engine.in_sync, f"{node.id} is not in sync")
    states = set(engine.peers.values())
    must(states <= {PeerState.IN_SYNC}, f"{node.id} sees its peers as {engine.peers}")
    must(not engine.take_deltas(), f"{node.id} has changes that its kernel was never given")
    claims = contents(engine).claims
    must(
        all(c.generation or c.outdone for c in claims),
        f"{node.id} still claims provisionally: {claims}",
    )
    must(all(c.generation <= engine.clock for c in claims), f"{node.id}: a claim beyond its clock")


def _own_table(world: World, node: Node, network: NetworkName) -> dict[FlowKey, Nat]:
    table = dict(node.engine.sessions[network].table(node.id))
    flows = {key: nat[TRANSLATION] for key, nat in table.items() if not is_standing(key)}
    conntrack = node.kernel.conntrack.tables[network]
    entries = {key: entry.nat[TRANSLATION] for key, entry in conntrack.items()}
    must(flows == entries, f"{node.id}: {_unlike(flows, entries, 'its table', 'conntrack')}")
    stood = sorted(
        (nat[:4] + key[8:9] + nat[4:6], socket_of(key))
        for key, nat in table.items()
        if is_standing(key)
    )
    right = sorted(_forwards(world, node, network).items())
    must(stood == right, f"{node.id}: standing sessions {stood}, its forwards are {right}")
    return table


def _forwards(world: World, node: Node, network: NetworkName) -> dict[SocketKey, SocketKey]:
    """The forwards that are in force at an AP: its own, or those of the addresses that it has."""
    own = node.domain.network_by_name[network]
    if not own.lets_forwards_move:
        return own.forwarded
    here = node.kernel.installed[network].addresses
    found: dict[SocketKey, SocketKey] = {}
    for other in world.nodes.values():
        its = other.domain.network_by_name[network]
        if its.nat_address in here:
            found |= its.forwarded
    return found


def _check_tables(
    node: Node, network: NetworkName, tables: Mapping[ApId, Mapping[FlowKey, Nat]]
) -> None:
    for anchor, table in tables.items():
        held = node.engine.sessions[network].table(anchor)
        what = f"{node.id} has another table of {anchor}"
        must(held == table, f"{what}: {_unlike(held, table, 'held here', 'there')}")
        digest = node.engine.sessions[network].digest(anchor).folded(DIGESTS)
        right = digest_of(table.items()).folded(DIGESTS)
        must(digest == right, f"{node.id} has a wrong digest of the table of {anchor}")


def _unlike(
    one: Mapping[FlowKey, object], other: Mapping[FlowKey, object], name: str, name_other: str
) -> str:
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    return "; ".join(
        f"{Flow.of(key)} is {_shown(one.get(key))} in {name}, "
        f"{_shown(other.get(key))} in {name_other}"
        for key in keys[:3]
    )


def _shown(nat: object) -> str:
    return nat.hex() if isinstance(nat, bytes) else str(nat)


def _check_anchors(tables: Mapping[ApId, Mapping[FlowKey, Nat]]) -> None:
    anchors: dict[FlowKey, list[ApId]] = {}
    for anchor, table in tables.items():
        for key in table:
            if not is_standing(key):
                anchors.setdefault(key, []).append(anchor)
    for key, aps in anchors.items():
        must(len(aps) == 1, f"{Flow.of(key)} is anchored at {aps}")


def _check_claims(world: World, network: NetworkName) -> dict[Mac, Claim]:
    first, *others = (_claims(node, network) for node in world.nodes.values())
    for node, claims in zip(list(world.nodes.values())[1:], others, strict=True):
        for mac in {**first, **claims}:
            one, other = first.get(mac), claims.get(mac)
            must(one == other, f"ap1 and {node.id} don't agree: {one}, {other}")
    for claim in first.values():
        highest = min(node.engine.clock for node in world.nodes.values())
        must(claim.generation <= highest, f"{claim} is beyond the clock of some AP")
    return first


def _claims(node: Node, network: NetworkName) -> dict[Mac, Claim]:
    return {client.claim.mac: client.claim for client in node.engine.clients[network]}


def _check_kernel(
    world: World,
    node: Node,
    network: NetworkName,
    tables: Mapping[ApId, Mapping[FlowKey, Nat]],
    claims: Mapping[Mac, Claim],
) -> None:
    installed = node.kernel.installed[network]
    wanted = node.engine.wanted()[network]
    must(installed == wanted, f"{node.id}: wanted, not installed: {difference(installed, wanted)}")
    right = _right(node.id, tables, claims)
    right.addresses, right.sources = installed.addresses, installed.sources
    if node.domain.network_by_name[network].lets_forwards_move:
        right.forwards = _forwards(world, node, network)
    must(installed == right, f"{node.id}: installed, not right: {difference(installed, right)}")


def _check_addresses(world: World, network: NetworkName) -> None:
    """Each NAT address is one AP's, all know whose, and no flow is translated to another one's."""
    holders: dict[IPv4Address, ApId] = {}
    for node in world.nodes.values():
        for address in node.kernel.installed[network].addresses:
            must(address not in holders, f"{address} is on {node.id} and {holders.get(address)}")
            holders[address] = node.id
    for node in world.nodes.values():
        for address, holder in holders.items():
            believed = node.engine.anchoring.book.holder(NatAddress(network, address))
            must(believed == holder, f"{node.id}: {address} is {holder}'s, not {believed}'s")
        for key, entry in node.kernel.conntrack.tables[network].items():
            address = Translation.of(entry.nat).address
            what = f"{node.id} translates {Flow.of(key)} to {address}, which is not there"
            must(node.kernel.has(address), what)


def _right(
    me: ApId, tables: Mapping[ApId, Mapping[FlowKey, Nat]], claims: Mapping[Mac, Claim]
) -> NetworkState:
    state = NetworkState()
    sockets: dict[SocketKey, set[ApId]] = {}
    abroad: set[bytes] = set()
    for anchor in sorted(tables):
        for key in tables[anchor]:
            if not is_standing(key) and anchor != me:
                state.flows[key] = anchor
            if key[8] == UDP or is_standing(key):
                sockets.setdefault(socket_of(key), set()).add(anchor)
            if anchor != me:
                abroad.add(client_of(key))
    state.sockets = {s: min(anchors) for s, anchors in sockets.items() if me not in anchors}
    for address, claim in _owners(claims).items():
        if claim.ap == me:
            state.neighbours[address] = state.known[address] = claim.mac
            if address.packed not in abroad:
                state.home[address] = claim.mac
        else:
            state.routes[address] = state.places[address] = claim.ap
            state.elsewhere[address] = claim.mac
    return state


def _owners(claims: Mapping[Mac, Claim]) -> dict[IPv4Address, Claim]:
    owners: dict[IPv4Address, Claim] = {}
    for claim in sorted(claims.values(), key=lambda claim: claim.precedence):
        owners.update(dict.fromkeys(claim.addresses, claim))
    return owners


def _check_place(world: World, client: Client) -> None:
    for node in world.nodes.values():
        clients = node.engine.clients[client.network]
        known = clients.get(client.mac)
        what = f"{node.id}: {client.mac} is at {client.at}, not as in"
        must(known is not None and known.claim.ap == client.at, f"{what} {known}")
        owner = clients.owner(client.address)
        must(owner is known, f"{node.id}: {client.address} is {client.mac}'s, not as in {owner}")
        at, hops = deliver(world, node, client.network, client.address)
        must(at == client.at, f"a packet at {node.id} to {client.address} ends at {at}")
        must(hops == (node.id != client.at), f"a packet to {client.address} takes {hops} hops")


def _check_talk(world: World, client: Client, talk: Talk) -> None:
    anchors = [
        node.id
        for node in world.nodes.values()
        if talk.key in node.kernel.conntrack.tables[client.network]
    ]
    if not anchors:
        return
    sent = send(world, client, talk.key, opens=False)
    flow = Flow.of(talk.key)
    must(sent.fate is Fate.TRANSLATED, f"{flow}, anchored at {anchors}: {sent.fate}")
    must([sent.anchor] == anchors, f"{flow}, anchored at {anchors}, goes to {sent.anchor}")
    assert sent.entry is not None
    found = answered(world, sent.entry, client, talk.key)
    must(found, f"{flow}: answers from {anchors} are lost")


def _check_empty(node: Node, network: Network) -> None:
    sessions, clients = node.engine.sessions[network.name], node.engine.clients[network.name]
    standing = {ap: len(s) for ap, s in sessions.all() if s and not all(map(is_standing, s))}
    must(not standing, f"{node.id} still has sessions: {standing}")
    awaited = [c.claim for c in clients if _is_awaited(node, network, c.claim)]
    left = [c.claim for c in clients if c.claim not in awaited]
    must(not left, f"{node.id} still knows {left}")
    must(clients.aged.keys() <= {c.mac for c in awaited}, f"{node.id}: {clients.aged} stay aged")
    state = node.kernel.installed[network.name]
    must(not state.flows, f"{node.id}: the kernel still has {state.flows}")
    if not awaited:
        must(
            not (state.routes or state.neighbours or state.known or state.home),
            f"{node.id}: {state}",
        )
    counted = {ap: counts for ap, counts in sessions._by_client.items() if counts}
    must(not counted, f"{node.id}: {counted} are counted for good")
    must(not sessions.lost and not sessions.touched_flows, f"{node.id}: changes stay for good")
    must(not clients._adopted, f"{node.id}: {clients._adopted} stay adopted")
    if network.takeover:
        right = {network.nat_address: True}
        must(state.addresses == right, f"{node.id}, without flows, holds {state.addresses}")
        must(bool(state.sources), f"{node.id} holds its address and doesn't translate to it")
    must(not state.diverted, f"{node.id}: {state.diverted} stay diverted")
    must(not node.engine._seen_early, f"{node.id}: sightings stay for good")


def _is_awaited(node: Node, network: Network, claim: Claim) -> bool:
    sessions = node.engine.sessions[network.name]
    return any(sessions.is_awaited(address.packed) for address in claim.addresses)
