"""What the tests of a running roam domain look at: agents, kernels, and time."""

from __future__ import annotations

import contextlib
import io
import json
import re
import time
from collections.abc import Callable, Collection
from ipaddress import IPv4Address
from typing import Any, NamedTuple, TypeVar

from apagent.cli import apctl
from apagent.lab.lab import Lab
from apagent.lab.plan import CLIENT_ADDRESSES, SERVER_ADDRESS, UPLINKS

_T = TypeVar("_T")

SERVER = str(SERVER_ADDRESS)
NOTICE_S = 5.0
"""Far longer than anything here takes: news from one AP to all others, mostly."""
_POLL_S = 0.01
_TABLE = "nft --stateless list table inet apagent"
_LISTINGS = {
    "rules": ("ip", "rule"),
    "routes": ("ip", "route", "show", "table", "all"),
    "neighbours": ("ip", "-4", "neigh", "show", "nud", "permanent"),
    "fdb": ("bridge", "fdb", "show", "dev", "apv-lan"),
    "device": ("sh", "-c", "ip -o link show dev apv-lan | cut -d: -f2-"),
    "sysctls": ("sysctl", "net.ipv4.conf.br-lan.proxy_arp"),
    "tunnel": ("ip", "-4", "-brief", "address", "show", "dev", "apv-lan"),
    "nft": ("sh", "-c", f"{_TABLE} | sed 's/ # progname .*//; /^\tflags owner/d'"),
}


def eventually(look: Callable[[], _T | None], timeout_s: float = NOTICE_S) -> _T:
    """The first answer that is true; fails with the last one otherwise."""
    deadline = time.monotonic() + timeout_s
    while not (answer := look()):
        assert time.monotonic() < deadline, f"still {answer!r} after {timeout_s} s"
        time.sleep(_POLL_S)
    return answer


def becomes(look: Callable[[], object], wanted: object, timeout_s: float = NOTICE_S) -> None:
    """Wait until `look` gives `wanted`; the difference is in the failure."""
    deadline = time.monotonic() + timeout_s
    while (answer := look()) != wanted and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    assert answer == wanted


def uplink(ap: str) -> str:
    """The address that the AP translates to."""
    return str(UPLINKS[10 + int(ap.removeprefix("ap"))])


def ask(lab: Lab, ap: str, *arguments: str) -> Any:
    """What `apctl ARGUMENTS -o json` prints, without a process for each question."""
    output = io.StringIO()
    socket = str(lab.place.control_socket(ap))
    with contextlib.redirect_stdout(output):
        code = apctl.main(["--socket", socket, *arguments, "-o", "json"])
    assert code in (0, 4), f"apctl {arguments} of {ap} ended with {code}"
    return json.loads(output.getvalue())


class Session(NamedTuple):
    """A session as `apctl flows` shows it."""

    protocol: str
    client: str
    client_port: int
    remote: str
    remote_port: int
    anchor: str


def sessions(lab: Lab, ap: str, *filters: str) -> set[Session]:
    """All sessions that the AP's agent knows."""
    flows = ask(lab, ap, "flows", *filters)
    return {Session(*(flow[field] for field in Session._fields)) for flow in flows}


def address(lab: Lab, client: str) -> str:
    """The client's own address."""
    return str(lab.plan.station(client).address)


def mac(lab: Lab, client: str) -> str:
    """The client's MAC."""
    return str(lab.plan.station(client).mac)


def serving(lab: Lab, client: str) -> list[str]:
    """The AP that serves the client, as every AP has it."""
    found = (_client(lab, ap, client) for ap in lab.aps)
    return ["" if client is None else client["serving_ap"] for client in found]


def _client(lab: Lab, ap: str, client: str) -> Any:
    wanted = mac(lab, client)
    return next((known for known in ask(lab, ap, "clients") if known["mac"] == wanted), None)


def served_by(lab: Lab, client: str, ap: str) -> None:
    """Wait until every AP knows that `ap` serves the client."""
    becomes(lambda: serving(lab, client), [ap] * len(lab.aps))


def agreed(lab: Lab, among: Collection[str] = ()) -> set[Session]:
    """Wait until every AP knows the same sessions and the kernels hold them; those sessions."""
    aps = among or lab.aps

    def known() -> tuple[set[Session]] | None:
        tables = [sessions(lab, ap) for ap in aps]
        if any(table != tables[0] for table in tables):
            return None
        held = all(tunnelled(lab, ap) == _foreign(tables[0], ap) for ap in aps)
        return (tables[0],) if held else None

    return eventually(known)[0]


def _foreign(table: set[Session], ap: str) -> set[Session]:
    return {session for session in table if session.anchor != ap}


def tunnelled(lab: Lab, ap: str) -> set[Session]:
    """The sessions that the AP's kernel sends to other anchors: what the nftables maps hold."""
    anchors = {key: verdict["goto"]["target"] for key, verdict in elements(lab, ap, "lan_anchors")}
    found = set()
    for key, value in elements(lab, ap, "lan_flows"):
        client, remote, protocol, port, remote_port = key["concat"]
        anchor = anchors[value].removeprefix("anchor_")
        found.add(Session(protocol, client, port, remote, remote_port, anchor))
    for key, value in elements(lab, ap, "lan_echoes"):
        client, remote, identifier = key["concat"]
        anchor = anchors[value].removeprefix("anchor_")
        found.add(Session("icmp", client, identifier, remote, 0, anchor))
    return found


def elements(lab: Lab, ap: str, name: str) -> list[Any]:
    """The elements of one of our nftables maps."""
    text = lab.run(ap, ["nft", "-j", "list", "map", "inet", "apagent", name]).stdout
    items = json.loads(text)["nftables"]
    found: list[Any] = next(item["map"] for item in items if "map" in item).get("elem", [])
    return found


def tracked(lab: Lab, ap: str, client: str) -> list[str]:
    """The AP's conntrack entries of the client's own flows."""
    argv = ["conntrack", "-L", "--orig-src", address(lab, client)]
    return lab.run(ap, argv).stdout.splitlines()


def nearby(lab: Lab, ap: str) -> set[str]:
    """The AP's permanent neighbour entries."""
    text = lab.run(ap, ["ip", "-4", "neigh", "show", "nud", "permanent"]).stdout
    return {line.strip() for line in text.splitlines()}


def host_routes(lab: Lab, ap: str) -> set[str]:
    """Addresses of the clients that the AP's kernel reaches by way of another AP."""
    text = lab.run(ap, ["ip", "-4", "route", "show", "table", "77000"], check=False).stdout
    found = {line.split()[0] for line in text.splitlines()}
    return {address for address in found if IPv4Address(address) in CLIENT_ADDRESSES}


def installed(lab: Lab, ap: str) -> dict[str, list[str]]:
    """All that is ours in the AP's kernel, and what it rests on.

    Words in order of the alphabet: a hash table's elements have no order of their own.
    """
    return {
        name: sorted(re.split(r"[\s,]+", lab.run(ap, argv, check=False).stdout))
        for name, argv in _LISTINGS.items()
    }
