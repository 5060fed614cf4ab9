"""A simulated roam domain: APs, clients, feeds, tunnels, and one clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from ipaddress import IPv4Address
from itertools import permutations
from random import Random

from apagent.core.domain import Domain, Forward, Network
from apagent.core.events import DrainRequested, ProbesAnswered
from apagent.core.liveness import ROUND_S
from apagent.core.model import TCP, UDP, ApId, FlowKey, Mac, NetworkName
from tests.domains import domain, lan
from tests.simulation.clients import Client
from tests.simulation.describe import describe
from tests.simulation.kernel import Kernel
from tests.simulation.node import NEVER, Node
from tests.simulation.scenario import Scenario, Violation
from tests.simulation.segment import Segment
from tests.simulation.streams import Subscription

SPARE_ADDRESSES = 2
"""Addresses per network beyond one for each client."""
NOBODYS = Mac("00:00:00:00:00:00")
"""The owner of a flow that nobody has any more."""
MAX_ROUNDS = 12
"""Rounds of probes that are made when time passes, however much: the machine is slow."""
MAX_SWEEPS = 400
"""In which everything that waits must have been worked off."""

Tell = Callable[[str], None]


def silent(_line: str) -> None:
    """Tell nobody."""


class World:
    """Everything there is. `tell` gets a line for all that happens."""

    def __init__(self, scenario: Scenario, tell: Tell = silent) -> None:
        self.time = 0.0
        self.random = Random(scenario.seed)
        self.tell = tell
        self.networks = _networks(scenario)
        self.probing = bool(scenario.probing)
        self.nodes: dict[ApId, Node] = {}
        segment = Segment(self.nodes, self._adopter)
        for i in range(scenario.aps):
            made = _domain(ApId(f"ap{i + 1}"), i, scenario, self.networks)
            kernel = Kernel(IPv4Address(f"192.0.2.{i + 1}"), made.network_by_name)
            node = Node(
                made,
                kernel,
                scenario.capacity,
                lambda: self.time,
                self._end_flow,
                self._ask,
                segment,
            )
            self.nodes[node.id] = node
        self.feeds = {
            (a, b): Subscription(self.nodes[a], self.nodes[b])
            for a, b in permutations(self.nodes, 2)
        }
        self.cut_tunnels: set[frozenset[ApId]] = set()
        self.clients = [_client(i, self.networks) for i in range(scenario.clients)]
        self.free = {
            n.name: [_address(n, 100 + i) for i in range(SPARE_ADDRESSES)] for n in self.networks
        }
        self.anchors: dict[tuple[NetworkName, FlowKey], set[ApId]] = {}
        """Every AP that ever translated a flow."""
        self.users = {(c.network, c.address): {c.mac} for c in self.clients}
        """Every client that ever had an address."""
        self._epochs = 0
        for node in self.nodes.values():
            self.start(node)

    # --- agents

    def start(self, node: Node) -> None:
        """Start the node's agent, if none runs."""
        if node.agent is None:
            node.powered = True
            self._epochs += 1
            self.batch(node, lambda: node.start(self._epochs))

    def stop(self, node: Node) -> None:
        """The node's agent dies, or has died."""
        node.stop()
        for (reader, writer), feed in self.feeds.items():
            if reader == node.id:
                feed.forget()
            if writer == node.id and feed.stream is not None:
                feed.stream.dead = True

    def reboot(self, node: Node) -> None:
        """The AP loses its power. What it had sent into a network that stalls isn't sent again."""
        self.stop(node)
        node.reboot()
        node.powered = False
        for (_, writer), feed in self.feeds.items():
            if writer == node.id and feed.stalled and feed.stream is not None:
                feed.stream.drop()

    def batch(self, node: Node, work: Callable[[], None]) -> None:
        """Have the node's agent do some work, of which it may die."""
        work()
        if node.agent is None:
            self.tell(f"{node.id}: its agent died at work")
            self.stop(node)

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.time += seconds
        for node in self.nodes.values():
            if node.agent is not None:
                self.batch(node, node.tick)
        if self.probing:
            for _ in range(min(MAX_ROUNDS, round(seconds / ROUND_S))):
                self._probe()

    def _probe(self) -> None:
        """A round of probes is over, at each AP."""
        for node in self.nodes.values():
            if node.agent is None:
                continue
            answers = frozenset(
                ap for ap in self.nodes if ap != node.id and self.tunnel(node.id, ap)
            )
            trouble = "" if node.kernel.uplink_works else "no carrier"
            uplinks = {network.name: trouble for network in self.networks}
            event = ProbesAnswered(answers, uplinks)
            self.batch(node, partial(node.work_off, [event]))

    # --- what is under way

    def sweep(self, random: Random, share: float = 1.0, messages: int = 3) -> bool:
        """Work off some of what waits anywhere, in any order; whether anything waited."""
        waiting: list[Node | Subscription] = [n for n in self.nodes.values() if n.ready]
        waiting += [feed for feed in self.feeds.values() if feed.ready]
        random.shuffle(waiting)
        for one in waiting[: max(1, round(share * len(waiting)))]:
            if one.ready:
                self._work_off(one, random, messages)
        return bool(waiting)

    def rest(self) -> None:
        """Work off all that waits. Raises Violation if that has no end."""
        for _ in range(MAX_SWEEPS):
            if not self.sweep(self.random):
                return
        raise Violation(f"no rest after {MAX_SWEEPS} sweeps: something goes round and round")

    def _work_off(self, one: Node | Subscription, random: Random, messages: int) -> None:
        if isinstance(one, Node):
            both = random.random() < 0.5
            flows = both or random.random() < 0.5
            events = one.read(flows=flows, clients=both or not flows)
            node = one
        else:
            events = one.pull(random.randint(1, messages))
            node = one.reader
        if self.tell is not silent:
            for event in events:
                self.tell(f"{node.id} <- {describe(event)}")
        self.batch(node, lambda: node.work_off(events))
        if isinstance(one, Subscription):
            one.check()

    # --- tunnels and flows

    def tunnel(self, a: ApId, b: ApId) -> bool:
        """Whether packets pass from `a` to `b`."""
        powered = self.nodes[a].powered and self.nodes[b].powered
        return powered and frozenset({a, b}) not in self.cut_tunnels

    def opened(self, node: Node, network: NetworkName, key: FlowKey) -> None:
        """The node translates a new flow."""
        self.anchors.setdefault((network, key), set()).add(node.id)

    def anchors_of(self, network: NetworkName, key: FlowKey) -> int:
        """How many APs translate this flow now."""
        return sum(key in n.kernel.conntrack.tables[network] for n in self.nodes.values())

    def _end_flow(self, node: Node, network: NetworkName, key: FlowKey) -> None:
        """The agent ends a flow: it must have a reason."""
        entry = node.kernel.conntrack.close(network, key)
        if entry is None:
            return
        address = IPv4Address(key[:4])
        if self.probing:
            pass
        elif len(self.anchors[network, key]) == 1 and len(self.users[network, address]) == 1:
            raise Violation(f"{node.id} ended the flow {key.hex()} without any reason")
        for client in self.clients:
            talk = client.talk(key) if client.network == network else None
            if talk is not None:
                client.end(talk)

    def _adopter(self, node: Node, network: NetworkName, key: FlowKey) -> Mac:
        """The node is about to continue a flow; whose it is."""
        self.opened(node, network, key)
        tables = (other.kernel.conntrack.tables[network] for other in self.nodes.values())
        return next((table[key].opener for table in tables if key in table), NOBODYS)

    def _ask(self, node: Node, network: NetworkName, mac: Mac) -> None:
        """The agent asks a client by ARP whether it is here; what it answers."""
        for client in self.clients:
            if (client.network, client.mac, client.at) == (network, mac, node.id):
                node.kernel.answer(client)

    # --- the end of all trouble

    def heal(self) -> None:
        """Everything works again, and everybody is somewhere."""
        self.cut_tunnels.clear()
        for feed in self.feeds.values():
            feed.cut = feed.stalled = False
        for node in self.nodes.values():
            node.crash_after = NEVER
            node.kernel.uplink_works = True
            self.start(node)

    def anchor_again(self) -> None:
        """No AP is drained any more."""
        for node in self.nodes.values():
            if node.agent is not None and node.agent.draining:
                node.agent.draining = False
                self.batch(node, partial(node.work_off, [DrainRequested(drain=False)]))


def _networks(scenario: Scenario) -> tuple[Network, ...]:
    return tuple(
        lan(f"lan{i}", f"10.{77 + i}.0.0/16", 77 + i) for i in range(max(1, scenario.networks))
    )


def _domain(me: ApId, index: int, scenario: Scenario, networks: tuple[Network, ...]) -> Domain:
    """The AP's configuration; of the scenario's port forwards, every AP has its share."""
    forwards: dict[NetworkName, list[Forward]] = {network.name: [] for network in networks}
    for i in range(scenario.forwards):
        if i % scenario.aps == index:
            client = _client(i % scenario.clients, networks)
            port = 8000 + i
            forwards[client.network].append(Forward((TCP, UDP)[i % 2], port, client.address, port))
    own = tuple(
        replace(
            n,
            forwards=tuple(forwards[n.name]),
            takeover=bool(scenario.takeover),
            nat_address=IPv4Address(f"203.0.{113 + i}.{index + 1}") if scenario.takeover else None,
        )
        for i, n in enumerate(networks)
    )
    return domain(me, scenario.aps, own)


def _client(index: int, networks: tuple[Network, ...]) -> Client:
    network = networks[index % len(networks)]
    mac = Mac(f"02:00:00:00:01:{index + 1:02x}")
    return Client(mac, network.name, _address(network, 10 + index), 20000)


def _address(network: Network, number: int) -> IPv4Address:
    return network.prefix[256 + number]
