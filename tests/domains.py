"""Domains, flows and claims that tests speak about."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network

from apagent.core.domain import Ap, Domain, Network
from apagent.core.model import (
    ApId,
    Claim,
    Flow,
    FlowKey,
    Mac,
    Nat,
    NetworkName,
    Translation,
    stamped,
)

LAN = NetworkName("lan")
AP1, AP2, AP3 = ApId("ap1"), ApId("ap2"), ApId("ap3")
ANN, BEN = Mac("02:00:00:00:00:0a"), Mac("02:00:00:00:00:0b")
ANN_IP, BEN_IP = IPv4Address("10.77.1.1"), IPv4Address("10.77.1.2")
NAT = Translation(IPv4Address("203.0.113.11"), 40000).packed
OTHER_NAT = Translation(IPv4Address("203.0.113.12"), 40000).packed


def lan(name: str = LAN, prefix: str = "10.77.0.0/16", vni: int = 77) -> Network:
    """A client network."""
    network = IPv4Network(prefix)
    return Network(
        name=NetworkName(name),
        client_interface=f"br-{name}",
        prefix=network,
        gateway=network[1],
        vni=vni,
        uplink="wan",
        nat_address=None,
    )


def takeover(name: str = LAN, address: str = "203.0.113.21") -> Network:
    """A client network whose NAT address may be taken over."""
    return replace(lan(name), nat_address=IPv4Address(address), takeover=True)


def domain(me: ApId = AP1, aps: int = 3, networks: tuple[Network, ...] = ()) -> Domain:
    """A roam domain of `aps` APs as `me` sees it."""
    ids = [ApId(f"ap{n}") for n in range(1, aps + 1)]

    def ap(id_: ApId, number: int) -> Ap:
        n = ids.index(id_) + 1
        return Ap(id_, number, IPv4Address(f"100.127.0.{n}"), IPv4Address(f"10.99.0.{n}"))

    others = [id_ for id_ in ids if id_ != me]
    return Domain(
        me=ap(me, 0),
        peers=tuple(ap(id_, number) for number, id_ in enumerate(others, 1)),
        networks=networks or (lan(),),
        tunnel_port=4789,
        tunnel_mtu=1450,
        table="apagent",
        mark_mask=0xFF000000,
        route_protocol=176,
        rule_priority=700,
        route_table_base=77000,
        nflog_group=77,
        device_prefix="apv-",
        sync_timeout_s=5.0,
    )


def tcp(port: int, client: IPv4Address = ANN_IP, remote: str = "198.51.100.10") -> FlowKey:
    """A TCP flow from `port` of a client to port 80."""
    return Flow(6, client, port, IPv4Address(remote), 80).key


def udp(port: int, client: IPv4Address = ANN_IP, remote: str = "198.51.100.10") -> FlowKey:
    """A UDP flow from `port` of a client to port 53."""
    return Flow(17, client, port, IPv4Address(remote), 53).key


def claim(ap: ApId, generation: int, mac: Mac = ANN, address: IPv4Address | None = ANN_IP) -> Claim:
    """A claim of `ap`."""
    addresses = frozenset() if address is None else frozenset({address})
    return Claim(LAN, mac, ap, generation, addresses)


def at(generation: int, nat: Nat = NAT) -> Nat:
    """A translation made under a claim of this generation."""
    return stamped(nat, generation)
