"""Whether all is well again, once everything is mended: every AP by itself, and all together."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

from apagent.errors import ApagentError
from apagent.lab.lab import Lab
from apagent.lab.plan import UPLINK
from tests.netns.observe import ask, nearby, sessions, tunnelled

_POLL_S = 0.5


def disagreements(lab: Lab, patience_s: float) -> list[str]:
    """What is wrong, and stays so for `patience_s`; a line each."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            wrong = _look(lab)
        except (ApagentError, AssertionError, KeyError) as error:
            wrong = [f"{type(error).__name__}: {error}"]
        if not wrong or time.monotonic() > deadline:
            return wrong
        time.sleep(_POLL_S)


def _look(lab: Lab) -> list[str]:
    statuses = {ap: ask(lab, ap, "status") for ap in lab.aps}
    peers = {ap: {peer["id"]: peer for peer in ask(lab, ap, "peers")} for ap in lab.aps}
    return [
        *_alone(statuses),
        *_of_peers(statuses, peers),
        *_addresses(lab, statuses),
        *_clients(lab),
        *_kernels(lab),
    ]


def _alone(statuses: dict[str, Any]) -> list[str]:
    wrong = [f"{ap} is not in sync" for ap, status in statuses.items() if not status["in_sync"]]
    for ap, status in statuses.items():
        wrong += [f"{ap} is degraded: {why}" for why in status["degraded"]]
        wrong += [
            f"{ap} is {anchor['mode']}"
            for anchor in status["anchors"]
            if anchor["mode"] not in ("", "active")
        ]
    return wrong


def _of_peers(statuses: dict[str, Any], peers: dict[str, dict[str, Any]]) -> list[str]:
    wrong = []
    for ap, known in peers.items():
        for peer, seen in known.items():
            if seen["state"] != "in-sync":
                wrong.append(f"{ap} has {peer} as {seen['state']}: {seen['reason']}")
            if seen["tunnel"] not in ("", "alive"):
                wrong.append(f"{ap} has the tunnel to {peer} as {seen['tunnel']}")
            if seen["checksum"] != statuses[peer]["checksum"]:
                wrong.append(
                    f"{ap} has {seen['sessions']} sessions of {peer} with checksum "
                    f"{seen['checksum']}, which has {statuses[peer]['own_sessions']} "
                    f"with {statuses[peer]['checksum']}"
                )
            if seen["refused"]:
                wrong.append(f"{ap} has refused {seen['refused']} statements of {peer}")
    return wrong


def _addresses(lab: Lab, statuses: dict[str, Any]) -> list[str]:
    said = Counter(
        address
        for status in statuses.values()
        for anchor in status["anchors"]
        for address in anchor["holds"]
    )
    there = Counter(address for ap in lab.aps for address in uplink_addresses(lab, ap))
    return [f"{n} APs say that they hold {address}" for address, n in said.items() if n > 1] + [
        f"{n} uplinks have {address}" for address, n in there.items() if n > 1
    ]


def uplink_addresses(lab: Lab, ap: str) -> list[str]:
    """The IPv4 addresses of an AP's uplink."""
    text = lab.run(ap, ["ip", "-j", "-4", "address", "show", "dev", UPLINK]).stdout
    return [entry["local"] for entry in json.loads(text)[0]["addr_info"]]


def _clients(lab: Lab) -> list[str]:
    """Every AP has every client where it is, and the AP that serves it its neighbour entry.

    A client without any session that its bridge had aged out may have left the domain; its address
    is unknown then until it speaks, and the kernel asks for it as any other would.
    """
    where = lab.locations()
    in_use = {session.client for ap in lab.aps for session in sessions(lab, ap)}
    wrong = []
    for ap in lab.aps:
        known = {client["mac"]: client["serving_ap"] for client in ask(lab, ap, "clients")}
        entries = " ".join(nearby(lab, ap))
        for client, there in where.items():
            station = lab.plan.station(client)
            if known.get(station.mac or "", "nowhere") != there:
                found = known.get(station.mac or "", "nowhere")
                wrong.append(f"{ap} has {client} at {found}, which is at {there}")
            is_near = f"{station.address} " in entries
            if is_near != (there == ap) and (is_near or str(station.address) in in_use):
                wrong.append(f"the kernel of {ap} is wrong on {client}, which is at {there}")
    return wrong


def _kernels(lab: Lab) -> list[str]:
    """The kernel of every AP sends each flow to the anchor that its agent names."""
    wrong = []
    for ap in lab.aps:
        foreign = {session for session in sessions(lab, ap) if session.anchor != ap}
        held = tunnelled(lab, ap)
        if held != foreign:
            wrong.append(
                f"the kernel of {ap} lacks {len(foreign - held)} sessions of peers and has "
                f"{len(held - foreign)} others: {sorted(foreign ^ held)[:4]}"
            )
    return wrong
