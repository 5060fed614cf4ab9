"""What a lab consists of, computed from how many APs, clients and client networks there are.

                          server 198.51.100.10, .11
                             |
                          internet ---- bridge `uplinks` 203.0.113.1/24
                           |                |                |
                          wan .11          wan .12          wan .13        each AP translates
                          ap1              ap2              ap3
                     br-lan 10.77.0.1  br-lan 10.77.0.1  br-lan 10.77.0.1  the same on every AP
                      |        |        |        |        |        |
                     wlan0    bh       wlan0    bh       wlan0    bh
        fabric:      bss1  backhaul    bss2  backhaul    bss3  backhaul    10.99.0.0/24
                      |
                     c1 ---- wlan0 of client1, 10.77.1.1/16, moved from bss to bss

A `bss` bridge stands for an AP's radio, so that APs are like real ones: one port towards many
stations, and forwarding entries that go stale. The router `internet` has no route to the clients'
prefix: an untranslated packet is a visible leak, and is never answered.

A second network, `guest`, is the same again beside it: br-guest 10.78.0.1, wlan1 and bridges
`guest1`, … on every AP. Clients belong to the networks in turn.

Interface indices are planned too, and unique in the whole lab. So all netlink messages can be
written before anything exists. Were the two ends of a veth pair to have the same index, the kernel
would take the pair for an ordinary device and report its carrier up to a second late
(net/core/link_watch.c, linkwatch_urgent_event).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from itertools import count, product

from apagent.core.model import Mac
from apagent.lab.errors import LabError, UnknownNode

MAX_APS = 100
MAX_CLIENTS = 250

CLIENT_ADDRESSES = IPv4Network("10.76.0.0/14")
"""All client networks are in it, and nothing else."""
CLIENT_PREFIX = IPv4Network("10.77.0.0/16")
GATEWAY = CLIENT_PREFIX[1]
GATEWAY_MAC = Mac("02:00:00:00:00:fe")
ROUTER_MAC = Mac("02:00:00:00:00:fd")
"""Of the provider's router. A bridge without one takes the lowest of its ports', and when a port is
added, whoever knows the former one sends into the void."""
UNDERLAY = IPv4Network("10.99.0.0/24")
UPLINKS = IPv4Network("203.0.113.0/24")
"""TEST-NET-3 (RFC 5737)."""
SERVER_LINK = IPv4Network("198.51.100.0/24")
"""TEST-NET-2 (RFC 5737)."""
SERVER_ADDRESS = SERVER_LINK[10]
SECOND_SERVER_ADDRESS = SERVER_LINK[11]

INTERNET, SERVER, FABRIC = "internet", "server", "fabric"
NAT_ADDRESSES = UPLINKS[100]
"""The NAT address of AP n, where it can move to another AP, is n above."""
CLIENT_INTERFACE = "br-lan"
UPLINK = "wan"
RADIO = "wlan0"

_FIRST_INDEX = 10


@dataclass(frozen=True, slots=True)
class ClientNetwork:
    """A network that clients roam in, the same on every AP."""

    name: str
    client_interface: str
    prefix: IPv4Network
    vni: int
    radio: str
    """The AP's radio; its other end in the fabric is `antenna` and the AP's number."""
    antenna: str
    bss: str
    """The fabric's bridge that stands for an AP's radio is this and the AP's number."""
    zone: int = 0
    """Conntrack zone, where another network has the same addresses."""

    @property
    def gateway(self) -> IPv4Address:
        """The address of every AP in it."""
        return self.prefix[1]


NETWORKS = (
    ClientNetwork("lan", CLIENT_INTERFACE, CLIENT_PREFIX, 77, RADIO, "radio", "bss"),
    ClientNetwork("guest", "br-guest", IPv4Network("10.78.0.0/16"), 78, "wlan1", "gradio", "guest"),
)


TWINS = tuple(
    replace(network, prefix=CLIENT_PREFIX, zone=zone) for zone, network in enumerate(NETWORKS, 1)
)
"""The same networks with the same addresses: client1 and client2 have the same one, and so on."""


def ap_name(number: int) -> str:
    """The name of AP `number`, from 1."""
    return f"ap{number}"


def client_name(number: int) -> str:
    """The name of client `number`, from 1."""
    return f"client{number}"


@dataclass(frozen=True, slots=True)
class Node:
    """A namespace: a router forwards between its interfaces, `gateway` is its default route."""

    name: str
    kind: str
    """`internet`, `server`, `fabric`, `ap` or `client`."""
    forwards: bool = False
    gateway: IPv4Address | None = None


@dataclass(frozen=True, slots=True)
class Interface:
    """A bridge or one end of a veth pair; `bridge` is the index of the one that it is a port of."""

    node: str
    name: str
    index: int
    mac: Mac | None = None
    addresses: tuple[IPv4Interface, ...] = ()
    bridge: int | None = None

    @property
    def address(self) -> IPv4Address:
        """Its first address."""
        return self.addresses[0].ip


@dataclass(frozen=True, slots=True)
class Veth:
    """A cable between two nodes."""

    near: Interface
    far: Interface


@dataclass(frozen=True)
class Plan:
    """A lab's nodes, bridges and cables, in the order in which they are made."""

    nodes: tuple[Node, ...]
    bridges: tuple[Interface, ...]
    veths: tuple[Veth, ...]
    networks: tuple[ClientNetwork, ...]

    @cached_property
    def aps(self) -> tuple[str, ...]:
        """Names of the APs."""
        return tuple(node.name for node in self.nodes if node.kind == "ap")

    @cached_property
    def clients(self) -> tuple[str, ...]:
        """Names of the clients."""
        return tuple(node.name for node in self.nodes if node.kind == "client")

    @cached_property
    def interfaces(self) -> tuple[Interface, ...]:
        """All bridges and cable ends."""
        ends = (end for veth in self.veths for end in (veth.near, veth.far))
        return (*self.bridges, *ends)

    @cached_property
    def _by_name(self) -> dict[tuple[str, str], Interface]:
        return {(interface.node, interface.name): interface for interface in self.interfaces}

    def node(self, name: str) -> Node:
        """The node of that name. Raises UnknownNode."""
        for node in self.nodes:
            if node.name == name:
                return node
        known = ", ".join(node.name for node in self.nodes)
        raise UnknownNode(f"the lab has no node {name!r}; it has {known}")

    def ap(self, name: str) -> str:
        """`name`, if it is an AP. Raises UnknownNode."""
        if name not in self.aps:
            raise UnknownNode(f"{name!r} is not an AP of the lab; it has {', '.join(self.aps)}")
        return name

    def client(self, name: str) -> str:
        """`name`, if it is a client. Raises UnknownNode."""
        if name not in self.clients:
            known = ", ".join(self.clients) or "none"
            raise UnknownNode(f"{name!r} is not a client of the lab; it has {known}")
        return name

    def interface(self, node: str, name: str) -> Interface:
        """One interface. Raises KeyError if the plan has none such."""
        return self._by_name[node, name]

    def on(self, node: str) -> list[Interface]:
        """The interfaces of a node."""
        return [interface for interface in self.interfaces if interface.node == node]

    def network(self, client: str) -> ClientNetwork:
        """The network that the client belongs to."""
        return _network(self.networks, int(client.removeprefix("client")))

    def bss(self, ap: str, network: ClientNetwork = NETWORKS[0]) -> Interface:
        """The bridge that stands for the AP's radio."""
        return self.interface(FABRIC, network.bss + ap.removeprefix("ap"))

    def antenna(self, ap: str, network: ClientNetwork = NETWORKS[0]) -> Interface:
        """The fabric's end of the AP's radio: what is sent there, the AP receives."""
        return self.interface(FABRIC, network.antenna + ap.removeprefix("ap"))

    def station(self, client: str) -> Interface:
        """The client's own end of its link."""
        return self.interface(client, RADIO)

    def port(self, client: str) -> Interface:
        """The fabric's end of the client's link: the one that roams."""
        return self.interface(FABRIC, "c" + client.removeprefix("client"))

    def nat_address(self, ap: str) -> IPv4Address:
        """The AP's NAT address, where it can move to another AP."""
        return NAT_ADDRESSES + int(ap.removeprefix("ap"))

    def underlay(self, ap: str) -> IPv4Address:
        """The AP's address on the backhaul, for its tunnels and its peering."""
        return self.interface(ap, "bh").address


def plan(aps: int, clients: int, networks: int = 1, *, twins: bool = False) -> Plan:
    """Plan a lab, its networks with the same addresses if they are to be `twins`.

    Raises LabError if there are too many or too few of anything.
    """
    if not 1 <= aps <= MAX_APS:
        raise LabError(f"a lab has 1 to {MAX_APS} APs, not {aps}")
    if not 0 <= clients <= MAX_CLIENTS:
        raise LabError(f"a lab has 0 to {MAX_CLIENTS} clients, not {clients}")
    if not 1 <= networks <= len(NETWORKS):
        raise LabError(f"a lab has 1 to {len(NETWORKS)} client networks, not {networks}")
    return _Planner(aps, clients, (TWINS if twins else NETWORKS)[:networks]).plan()


def _network(networks: tuple[ClientNetwork, ...], client: int) -> ClientNetwork:
    return networks[(client - 1) % len(networks)]


class _Planner:
    def __init__(self, aps: int, clients: int, networks: tuple[ClientNetwork, ...]) -> None:
        self._aps = range(1, aps + 1)
        self._clients = range(1, clients + 1)
        self._networks = networks
        self._indices = count(_FIRST_INDEX)

    def plan(self) -> Plan:
        bridges = tuple(self._bridges())
        index = {(bridge.node, bridge.name): bridge.index for bridge in bridges}
        return Plan(tuple(self._nodes()), bridges, tuple(self._veths(index)), self._networks)

    def _nodes(self) -> Iterator[Node]:
        yield Node(INTERNET, INTERNET, forwards=True)
        yield Node(SERVER, SERVER, gateway=SERVER_LINK[1])
        yield Node(FABRIC, FABRIC)
        for ap in self._aps:
            yield Node(ap_name(ap), "ap", forwards=True, gateway=UPLINKS[1])
        for client in self._clients:
            gateway = _network(self._networks, client).gateway
            yield Node(client_name(client), "client", gateway=gateway)

    def _bridges(self) -> Iterator[Interface]:
        yield self._bridge(INTERNET, "uplinks", ROUTER_MAC, _on(UPLINKS, 1))
        yield self._bridge(FABRIC, "backhaul")
        for number, network in product(self._aps, self._networks):
            yield self._bridge(FABRIC, f"{network.bss}{number}")
            yield self._bridge(
                ap_name(number),
                network.client_interface,
                mac=GATEWAY_MAC,
                addresses=_on(network.prefix, 1),
            )

    def _bridge(
        self,
        node: str,
        name: str,
        mac: Mac | None = None,
        addresses: tuple[IPv4Interface, ...] = (),
    ) -> Interface:
        return Interface(node, name, next(self._indices), mac, addresses)

    def _veths(self, bridge: dict[tuple[str, str], int]) -> Iterator[Veth]:
        yield Veth(
            self._end(INTERNET, "srv", _on(SERVER_LINK, 1)),
            self._end(SERVER, "eth0", _on(SERVER_LINK, 10, 11)),
        )
        for number in self._aps:
            ap = ap_name(number)
            yield Veth(
                self._end(ap, UPLINK, _on(UPLINKS, 10 + number)),
                self._port(INTERNET, ap, bridge[INTERNET, "uplinks"]),
            )
            yield Veth(
                self._end(ap, "bh", _on(UNDERLAY, number)),
                self._port(FABRIC, f"bh{number}", bridge[FABRIC, "backhaul"]),
            )
            for network in self._networks:
                yield Veth(
                    self._port(ap, network.radio, bridge[ap, network.client_interface]),
                    self._port(
                        FABRIC,
                        f"{network.antenna}{number}",
                        bridge[FABRIC, f"{network.bss}{number}"],
                    ),
                )
        for number in self._clients:
            first = (number - 1) % len(self._aps) + 1
            network = _network(self._networks, number)
            host = 256 + ((number - 1) // len(self._networks) + 1 if network.zone else number)
            yield Veth(
                self._end(
                    client_name(number),
                    RADIO,
                    _on(network.prefix, host),
                    _client_mac(number),
                ),
                self._port(FABRIC, f"c{number}", bridge[FABRIC, f"{network.bss}{first}"]),
            )

    def _end(
        self, node: str, name: str, addresses: tuple[IPv4Interface, ...], mac: Mac | None = None
    ) -> Interface:
        return Interface(node, name, next(self._indices), mac, addresses)

    def _port(self, node: str, name: str, bridge: int) -> Interface:
        return Interface(node, name, next(self._indices), bridge=bridge)


def _on(network: IPv4Network, *hosts: int) -> tuple[IPv4Interface, ...]:
    """Host addresses with the network's prefix length: 10.77.1.1/16 is host 257 of its network."""
    return tuple(IPv4Interface((int(network[host]), network.prefixlen)) for host in hosts)


def _client_mac(number: int) -> Mac:
    return Mac(f"02:00:00:00:01:{number:02x}")
