"""The configuration file: what is accepted, what is refused, and what the refusal says."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from apagent.config import Endpoint, load, parse
from apagent.core.domain import Forward, allocate_numbers, tunnel_address, tunnel_mac
from apagent.core.model import ApId
from apagent.errors import ConfigError

GOOD = """
[ap]
id = "ap1"
[tunnel]
underlay = "10.99.0.1"
[peering]
listen = "10.99.0.1:7411"
[[peers]]
id = "ap2"
address = "10.99.0.2:7411"
underlay = "10.99.0.2"
[[networks]]
name = "lan"
client_interface = "br-lan"
prefix = "10.77.0.0/16"
gateway = "10.77.0.1"
vni = 77
uplink = "wan"
nat = "masquerade"
"""
SECOND = """
[[networks]]
name = "guest"
client_interface = "br-guest"
prefix = "10.78.0.0/16"
gateway = "10.78.0.1"
vni = 78
uplink = "wan"
"""


def test_a_minimal_file_gets_sane_defaults() -> None:
    config = parse(GOOD)
    assert config.ap == "ap1"
    assert config.listen == Endpoint("10.99.0.1", 7411)
    assert config.tunnel.port == 4789
    assert config.socket == Path("/run/apagent/control.sock")
    assert config.kernel.table == "apagent"
    assert config.kernel.capacity == 255
    assert config.networks[0].nat_address is None


def test_the_peer_feed_listens_on_loopback_unless_told() -> None:
    assert parse(GOOD.replace('listen = "10.99.0.1:7411"', "")).listen.host == "127.0.0.1"


def test_a_nat_address_replaces_masquerade() -> None:
    config = parse(GOOD.replace('"masquerade"', '"203.0.113.11"'))
    assert config.networks[0].nat_address == IPv4Address("203.0.113.11")


def test_both_sides_derive_the_same_tunnel_address() -> None:
    config = parse(GOOD)
    swapped = parse(GOOD.replace('"ap1"', '"x"').replace('"ap2"', '"ap1"').replace('"x"', '"ap2"'))
    assert config.tunnel.address == swapped.peers[0].tunnel_address
    assert config.peers[0].tunnel_address == swapped.tunnel.address


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('id = "ap1"', "", "ap.id: is missing; set it"),
        ('id = "ap1"', "id = 1", "ap.id: expected a string, found an integer"),
        ('id = "ap1"', 'id = "a b"', "ap.id: 'a b' is not usable"),
        ('id = "ap1"', 'id = "ap1"\nidd = 1', "ap.idd: unknown key; did you mean 'id'?"),
        ("[peering]", "[peerng]", "peerng: unknown key; did you mean 'peering'?"),
        ("vni = 77", "vni = 16777216", "networks[0].vni: 16777216 is out of range"),
        ("vni = 77", 'vni = "77"', "networks[0].vni: expected an integer, found a string"),
        ("vni = 77", "vni = true", "networks[0].vni: expected an integer, found a boolean"),
        ("10.77.0.0/16", "10.77.0.1/16", "networks[0].prefix: '10.77.0.1/16' is not an IPv4"),
        ("10.77.0.0/16", "fd00::/64", "networks[0].prefix: 'fd00::/64' is not an IPv4"),
        ('"10.77.0.1"', '"10.78.0.1"', "networks[0].gateway: 10.78.0.1 is outside the prefix"),
        ('"masquerade"', '"snat"', "networks[0].nat: 'snat' is neither"),
        ('uplink = "wan"', 'uplink = "br-lan"', "networks[0].uplink: br-lan is the client"),
        ('uplink = "wan"', 'uplink = "a b"', "networks[0].uplink: 'a b' is not usable"),
        ('"10.99.0.2:7411"', '"10.99.0.2"', "peers[0].address: '10.99.0.2' is not usable"),
        ('"10.99.0.2:7411"', '"10.99.0.2:0"', "peers[0].address: port 0 is out of range"),
        ('id = "ap2"', 'id = "ap1"', "peers[0].id: ap1 is used by ap.id too"),
        (
            'underlay = "10.99.0.2"',
            'underlay = "10.99.0.1"',
            "peers[0].underlay: 10.99.0.1 is used by tunnel.underlay too",
        ),
        (
            'underlay = "10.99.0.1"',
            'underlay = "10.77.0.9"',
            "tunnel.underlay: 10.77.0.9 is inside networks[0].prefix",
        ),
        ("[[networks]]", "[[netwrks]]", "netwrks: unknown key; did you mean 'networks'?"),
        ("[[peers]]", "[peers]", "peers: there may be several; write [[peers]]"),
        ("[ap]", "[[ap]]", "ap: there is only one; write [ap]"),
        ("[ap]", "[ap", "not valid TOML"),
        ("vni = 77", "vni = " + "7" * 5000, "not valid TOML"),
        ("vni = 77", "vni = 77.0", "networks[0].vni: expected an integer, found a decimal number"),
        (
            "10.77.0.0/16",
            "10.77.1.5/16",
            "networks[0].prefix: '10.77.1.5/16' is not an IPv4 prefix such as 10.0.0.0/16 (10.77.",
        ),
        (
            'underlay = "10.99.0.1"',
            'underlay = "010.99.0.1"',
            "tunnel.underlay: '010.99.0.1' is not an IPv4 address such as 10.0.0.1 (Leading zeros",
        ),
        (
            'nat = "masquerade"',
            'successor = "ap1"',
            "networks[0].successor: ap1 is no peer; choose one of: ap2",
        ),
        ("[peering]", "[peering]\nsync_timeout_s = 1" + "0" * 400, "peering.sync_timeout_s: 1000"),
        ("vni = 77", "Vni = 77", "networks[0].Vni: unknown key; did you mean 'vni'?"),
    ],
)
def test_a_refusal_names_the_key_and_the_fault(old: str, new: str, expected: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse(GOOD.replace(old, new, 1))
    assert str(refusal.value).startswith(expected)


@pytest.mark.parametrize(
    ("key", "misspelt", "table"),
    [
        ("id", "idd", "ap"),
        ("underlay", "underly", "tunnel"),
        ("address", "adress", "peers[0]"),
        ("gateway", "gatway", "networks[0]"),
        ("uplink", "uplnk", "networks[0]"),
        ("client_interface", "client-interface", "networks[0]"),
    ],
)
def test_a_required_key_that_is_misspelt_is_recognised(key: str, misspelt: str, table: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse(GOOD.replace(f"\n{key} = ", f"\n{misspelt} = ", 1))
    expected = f"{table}.{misspelt}: unknown key; did you mean '{key}'?"
    assert str(refusal.value).startswith(expected)


def test_a_prefix_with_host_bits_is_answered_with_the_one_that_is_meant() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 10\.77\.0\.0/16\?$"):
        parse(GOOD.replace("10.77.0.0/16", "10.77.1.5/16"))


def test_a_required_key_that_is_missing_is_not_taken_for_a_longer_one() -> None:
    text = GOOD.replace('uplink = "wan"', 'uplink_probes = ["198.51.100.1"]')
    with pytest.raises(ConfigError, match=r"^networks\[0\]\.uplink: is missing; set it$"):
        parse(text)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            '"10.77.0.1"',
            '"10.77.0.0"',
            "networks[0].gateway: 10.77.0.0 is the network address of 10.77.0.0/16; use one that",
        ),
        (
            '"10.77.0.1"',
            '"10.77.255.255"',
            "networks[0].gateway: 10.77.255.255 is the broadcast address of 10.77.0.0/16; use one",
        ),
        ('"10.77.0.1"', '"224.0.0.1"', "networks[0].gateway: 224.0.0.1 is a multicast address; "),
        ("10.77.0.0/16", "10.77.0.1", "networks[0].prefix: 10.77.0.1/32 has no room for clients; "),
        (
            '"masquerade"',
            '"10.77.3.1"',
            "networks[0].nat: 10.77.3.1 is inside networks[0].prefix 10.77.0.0/16, and would be",
        ),
        ('"masquerade"', '"239.1.1.1"', "networks[0].nat: 239.1.1.1 is a multicast address; use"),
        ('"masquerade"', '"127.0.0.1"', "networks[0].nat: 127.0.0.1 is a loopback address; use"),
        ('"masquerade"', '"0.0.0.0"', "networks[0].nat: 0.0.0.0 is the unspecified address; use"),
        (
            '"masquerade"',
            '"255.255.255.255"',
            "networks[0].nat: 255.255.255.255 is the broadcast address; use one that a host can",
        ),
        (
            '"masquerade"',
            f'"{tunnel_address(ApId("ap2"), IPv4Network("100.127.0.0/16"))}"',
            "networks[0].nat: 100.127.72.255 is peers[0].tunnel_address too; use another",
        ),
        (
            'nat = "masquerade"',
            'nat = "10.99.0.2"\ntakeover = true',
            "networks[0].nat: 10.99.0.2 is used by peers[0].underlay too; with takeover use an",
        ),
        (
            'nat = "masquerade"',
            'nat = "169.254.1.1"\ntakeover = true',
            "networks[0].nat: 169.254.1.1 is link-local; with takeover use another",
        ),
        (
            '"masquerade"',
            '"masquerade"\nuplink_probes = [1, 2]',
            "networks[0].uplink_probes: expec",
        ),
        (
            '"masquerade"',
            '"masquerade"\nuplink_probes = ["0.0.0.0"]',
            "networks[0].uplink_probes: 0.0.0.0 is the unspecified address; use one that a host",
        ),
        (
            'underlay = "10.99.0.2"',
            'underlay = "10.77.0.2"',
            "peers[0].underlay: 10.77.0.2 is inside networks[0].prefix 10.77.0.0/16; use an addre",
        ),
        (
            'underlay = "10.99.0.1"',
            'underlay = "127.0.0.1"',
            "tunnel.underlay: 127.0.0.1 is a loopback address; use one that a host can have",
        ),
        (
            '"10.99.0.2:7411"',
            '"10.99.0.1:7411"',
            "peers[0].address: 10.99.0.1:7411 is used by peering.listen too; give each AP its own",
        ),
        (
            '"10.99.0.2:7411"',
            '"10.99.0.256:7411"',
            "peers[0].address: 10.99.0.256 is neither an IPv4 address nor a name",
        ),
    ],
)
def test_addresses_that_can_not_work_are_refused(old: str, new: str, expected: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse(GOOD.replace(old, new, 1))
    assert str(refusal.value).startswith(expected)


def test_a_nat_address_inside_another_network_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^networks\[0\]\.nat: .* inside networks\[1\]\.prefix"):
        parse(GOOD.replace('"masquerade"', '"10.78.3.1"') + SECOND)


def test_an_uplink_that_is_the_underlay_may_be_translated_to() -> None:
    nat = IPv4Address("10.99.0.1")
    assert parse(GOOD.replace('"masquerade"', f'"{nat}"')).networks[0].nat_address == nat


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("10.78.0.0/16", "10.77.128.0/17", "networks[1].gateway"),
        ('"guest"', '"lan"', "networks[1].name: lan is used by networks[0] too"),
        ("vni = 78", "vni = 77", "networks[1].vni: 77 is used by networks[0] too"),
        ("br-guest", "br-lan", "networks[1].client_interface: br-lan is used by networks[0] too"),
    ],
)
def test_networks_may_not_share(old: str, new: str, expected: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse(GOOD + SECOND.replace(old, new))
    assert str(refusal.value).startswith(expected)


def test_networks_with_takeover_have_a_nat_address_each() -> None:
    takeover = 'takeover = true\nnat = "203.0.113.21"\n'
    first = GOOD.replace('nat = "masquerade"\n', takeover)
    with pytest.raises(ConfigError, match=r"^networks\[1\]\.nat: .* used by networks\[0\]\.nat"):
        parse(first + SECOND + takeover)
    assert parse(first + SECOND + takeover.replace("21", "22")).networks[1].takeover


def test_overlapping_prefixes_are_refused() -> None:
    overlap = SECOND.replace("10.78.0.0/16", "10.77.8.0/24").replace("10.78.0.1", "10.77.8.1")
    with pytest.raises(ConfigError, match=r"^networks\[1\]\.prefix: .* overlaps 10\.77\.0\.0/16"):
        parse(GOOD + overlap)


FORWARD = "[[networks.forwards]]\nport = 8080\nclient = '10.77.1.5'\n"


def test_port_forwards() -> None:
    [network] = parse(GOOD + FORWARD).networks
    assert network.forwards == (Forward(6, 8080, IPv4Address("10.77.1.5"), 8080),)
    [network] = parse(GOOD + FORWARD + "protocol = 'udp'\nclient_port = 53\n").networks
    assert network.forwards == (Forward(17, 8080, IPv4Address("10.77.1.5"), 53),)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (FORWARD.replace("10.77.1.5", "10.78.0.1"), "networks[0].forwards[0].client: 10.78.0.1 is"),
        (
            FORWARD.replace("10.77.1.5", "10.77.0.1"),
            "networks[0].forwards[0].client: 10.77.0.1 is the gateway's address; use a client's",
        ),
        (
            FORWARD.replace("10.77.1.5", "10.77.0.0"),
            "networks[0].forwards[0].client: 10.77.0.0 is the network address; use a client's",
        ),
        (
            FORWARD.replace("[[networks.forwards]]", "[networks.forwards]"),
            "networks[0].forwards: there may be several; write [[networks.forwards]]",
        ),
        (FORWARD + FORWARD, "networks[0].forwards[1].port: 8080 on wan is taken by networks[0].fo"),
        (
            FORWARD + "isolate_clients = true\n",
            "networks[0].forwards[0].isolate_clients: unknown key; it belongs to networks[0]: wri",
        ),
        (FORWARD + "protocol = 'sctp'\n", "networks[0].forwards[0].protocol: 'sctp' is unknown"),
        (f"zone = 1\n{FORWARD}", "networks[0].zone: a network with a zone can't have forwards"),
        ("isolate_clients = 1\n", "networks[0].isolate_clients: expected true or false, found an"),
    ],
)
def test_forwards_isolation_and_zones_are_checked(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse(GOOD + text)
    assert str(refusal.value).startswith(expected)


def test_networks_with_zones_may_share_addresses() -> None:
    twin = SECOND.replace("10.78.", "10.77.")
    config = parse(f"{GOOD}zone = 1\n{twin}zone = 2\n")
    domain = config.domain({}, 1450)
    lan, guest = domain.networks
    assert domain.mark(domain.peers[0]) == 0x01000000
    assert (domain.zone_mark(guest), domain.zone_mark(lan)) == (0xFF000000, 0xFE000000)
    with pytest.raises(ConfigError, match=r"^networks\[1\]\.prefix: .* or set zone in both"):
        parse(f"{GOOD}zone = 1\n{twin}")
    with pytest.raises(ConfigError, match=r"^networks\[1\]\.zone: 1 is used by networks\[0\]"):
        parse(f"{GOOD}zone = 1\n{twin}zone = 1\n")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mark_mask = 0x0a000000", "kernel.mark_mask: 0xa000000 has gaps"),
        ("mark_mask = 0", "kernel.mark_mask: 0 is out of range"),
        ('table = "a b"', "kernel.table: 'a b' is not usable"),
        ("route_protocol = 3", "kernel.route_protocol: 3 is out of range"),
    ],
)
def test_the_kernel_table_is_checked(line: str, expected: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse(f"{GOOD}\n[kernel]\n{line}\n")
    assert str(refusal.value).startswith(expected)


def test_a_mask_too_small_for_the_peers_is_refused() -> None:
    more = '[[peers]]\nid="ap3"\naddress="10.99.0.3:7411"\nunderlay="10.99.0.3"\n'
    with pytest.raises(ConfigError, match=r"kernel\.mark_mask: 0x6 tells 2 peers and zones apart"):
        parse(f"{GOOD}\n{more}\n{more.replace('3', '4')}\n[kernel]\nmark_mask = 6\n")


def test_load_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    with pytest.raises(ConfigError, match="can't be read"):
        load(path)
    path.write_text("[ap]\n")
    with pytest.raises(ConfigError, match=rf"^{path}: ap\.id: is missing"):
        load(path)
    path.write_text(GOOD)
    assert load(path).ap == "ap1"
    path.write_text(GOOD, encoding="utf-8-sig")
    assert load(path).ap == "ap1"


def test_peers_keep_the_numbers_that_the_kernel_holds() -> None:
    ap2, ap3, ap4 = ApId("ap2"), ApId("ap3"), ApId("ap4")
    assert allocate_numbers([ap2, ap3], {}, 255) == {ap2: 1, ap3: 2}
    assert allocate_numbers([ap4, ap3, ap2], {ap3: 1, ap2: 9}, 255) == {ap2: 9, ap3: 1, ap4: 2}
    assert allocate_numbers([ap2, ap3], {ap2: 300}, 255) == {ap2: 1, ap3: 2}
    assert allocate_numbers([ap2, ap4], {ap2: 1, ap3: 2}, 255) == {ap2: 1, ap4: 3}
    assert allocate_numbers([ap2, ap4], {ap2: 1, ap3: 2}, 2) == {ap2: 1, ap4: 2}
    with pytest.raises(ValueError, match="room for 1"):
        allocate_numbers([ap2, ap3], {}, 1)


def test_derived_addresses_and_macs_are_usable() -> None:
    assert parse(GOOD).tunnel.address in IPv4Network("100.127.0.0/16")
    first = int(tunnel_mac(ApId("ap1"))[:2], 16)
    assert first & 3 == 2  # locally administered, unicast (IEEE 802)
    network = IPv4Network("10.0.0.0/30")
    hosts = {tunnel_address(ApId(f"ap{n}"), network) for n in range(50)}
    assert hosts == set(network.hosts())
