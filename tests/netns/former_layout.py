"""What an earlier revision made of an AP's kernel, in the place of what the present one made."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from apagent.core.model import NetworkName
from apagent.kernel.nft import NftTable, messages
from apagent.kernel.nft.elements import (
    CLIENT_SIZE,
    ECHO_SIZE,
    FLOW_SIZE,
    SOCKET_SIZE,
    UPLINK_SIZE,
    ElementChange,
    pack_data,
    parse_elements,
    transactions,
)
from apagent.kernel.nft.installed import listing
from apagent.kernel.nft.sets import Names, anchor_value
from apagent.kernel.wire import Message, Netlink
from apagent.lab import namespaces
from apagent.lab.lab import Lab

_DIRECTORY = Path(__file__).parent / "layouts"
_NETLINK_NETFILTER = 12
_TABLE = "apagent"
_LAN = Names.of(NetworkName("lan"))
_KEY_SIZES = {
    _LAN.flows: FLOW_SIZE,
    _LAN.echoes: ECHO_SIZE,
    _LAN.sockets: SOCKET_SIZE,
    _LAN.known: CLIENT_SIZE,
    _LAN.elsewhere: CLIENT_SIZE,
    _LAN.places: CLIENT_SIZE,
    _LAN.home: CLIENT_SIZE,
    _LAN.sources: UPLINK_SIZE,
}


def install(lab: Lab, ap: str, revision: str) -> None:
    """Give the AP, whose agent is down, the former table, with the elements that are there now.

    Maps and sets of clients held the same in all revisions so far, but for the anchors' numbers.
    """
    layout = json.loads((_DIRECTORY / f"{revision}.json").read_text(encoding="ascii"))
    with namespaces.inside(lab.namespace(ap)):
        _replace_table(layout)
    _replace_routing(lab, ap, layout)


def _replace_table(layout: dict[str, Any]) -> None:
    with contextlib.closing(NftTable()) as table:
        anchors = table.anchor_numbers(_TABLE)
    renumbered = {
        anchor_value(number): anchor_value(layout["numbers"][ap]) for ap, number in anchors.items()
    }
    with contextlib.closing(Netlink(_NETLINK_NETFILTER)) as netlink:
        changes = [
            ElementChange(
                map_, key, deleted=False, data=value and pack_data(renumbered.get(value, value))
            )
            for map_, size in _KEY_SIZES.items()
            if map_ in layout["sets"]
            for body in listing(netlink, messages.list_elements(_TABLE, map_))
            for key, value in parse_elements(body, size)
        ]
        netlink.transaction(messages.BEGIN, [messages.delete_table(_TABLE)], messages.END)
    # As the agent does it: the table belongs to a socket while it is filled, and then to nobody.
    with contextlib.closing(NftTable()) as table:
        table._own(_TABLE)
        former = [
            Message(type_, flags, bytes.fromhex(body)) for type_, flags, body in layout["nft"]
        ]
        elements = [message for batch in transactions(_TABLE, changes) for message in batch]
        table._transact(_TABLE, [*former, *elements])


def _replace_routing(lab: Lab, ap: str, layout: dict[str, Any]) -> None:
    lab.run(ap, ["ip", "rule", "flush", "protocol", "176"])
    for table in ("77000", "77001", "77002"):
        lab.run(ap, ["ip", "route", "flush", "table", table], check=False)
    for rule in layout["rules"]:
        lab.run(ap, ["ip", "rule", "add", *rule.split()])
    for route in layout["routes"]:
        lab.run(ap, ["ip", "route", "add", *route.split()])
