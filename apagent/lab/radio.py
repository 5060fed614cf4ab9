"""The air between clients and APs: who is associated where, and what a roam does to it.

A roam moves the client's port from one bss bridge to another. Then the new AP's 802.11 stack tells
its bridge and the switches behind it where the client is now, with a Layer 2 Update frame: an LLC
XID response, broadcast with the client's MAC as source (mac80211 sends it in
cfg80211_send_layer2_update, net/wireless/util.c; hostapd in iapp_layer2_update).
"""

from __future__ import annotations

import contextlib
import socket
import time
from socket import NETLINK_ROUTE

from apagent.kernel.wire import Message, Netlink
from apagent.lab import build, namespaces, rtnl
from apagent.lab.errors import LabError
from apagent.lab.place import Place
from apagent.lab.plan import FABRIC, Plan

_CARRIER_TIMEOUT_S = 3.0
_CARRIER_POLL_S = 0.0002
_BROADCAST = b"\xff" * 6
_XID = bytes(
    (
        0x00,  # DSAP: null
        0x01,  # SSAP: null, and this is a response
        0xAF,  # XID, final bit set
        0x81,  # basic format of IEEE 802.2
        0x01,  # class 1: only unnumbered information
        0x00,  # receive window
    )
)


def layer2_update(mac: str) -> bytes:
    """The frame that an AP sends for a client that has just associated."""
    return _BROADCAST + bytes.fromhex(mac.replace(":", "")) + len(_XID).to_bytes(2, "big") + _XID


class Radio:
    """Open sockets in the fabric, so that a roam costs one netlink request and one frame."""

    def __init__(self, place: Place, plan: Plan) -> None:
        self._place = place
        self._plan = plan
        with contextlib.ExitStack() as stack, namespaces.inside(place.namespace(FABRIC)):
            self._netlink = Netlink(NETLINK_ROUTE)
            stack.callback(self._netlink.close)
            # Protocol 0, the default: the socket only sends.
            self._packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
            stack.callback(self._packets.close)
            self._sockets = stack.pop_all()

    def close(self) -> None:
        """Close the sockets."""
        self._sockets.close()

    def roam(self, client: str, ap: str, *, silent: bool = False, carrier: bool = False) -> int:
        """Associate a client with an AP; returns when its link was up there (CLOCK_MONOTONIC, ns).

        `silent` leaves the Layer 2 Update frame out. `carrier` takes the client's carrier down
        before and up after; else it stays up. Raises LabError and KernelFault.
        """
        port = self._plan.port(self._plan.client(client))
        network = self._plan.network(client)
        move = rtnl.enslave(port, self._plan.bss(self._plan.ap(ap), network).index)
        if carrier:
            self._switch_carrier(client, move)
        else:
            self._netlink.request([move])
        linked = time.monotonic_ns()
        if not silent:
            frame = layer2_update(self._plan.station(client).mac or "")
            self._packets.sendto(frame, (self._plan.antenna(ap, network).name, 0))
        return linked

    def location(self, client: str) -> str:
        """The AP that a client is associated with, as the kernel has it. Raises LabError."""
        ap = self.locations()[self._plan.client(client)]
        if ap is None:
            raise LabError(f"{client} is not associated with any AP")
        return ap

    def locations(self) -> dict[str, str | None]:
        """All clients, and the AP that each is associated with."""
        masters = dict(map(rtnl.parse_master, self._netlink.table(rtnl.dump_links())))
        aps = {
            self._plan.bss(ap, network).index: ap
            for ap in self._plan.aps
            for network in self._plan.networks
        }
        return {
            client: aps.get(masters.get(self._plan.port(client).index, 0))
            for client in self._plan.clients
        }

    def _switch_carrier(self, client: str, move: Message) -> None:
        """Move the client while its carrier is down; both changes wait until it has noticed.

        The kernel reports a carrier's change from a work queue (net/core/link_watch.c): a carrier
        that is back by then was never gone for the client. The bss bridge, too, waits for that
        report before it forwards to the client's port; no AP speaks to a client that can't hear.
        """
        port, own = self._plan.port(client).index, self._plan.station(client).index
        what = f"switching the carrier of {client}"
        with build.route_socket(self._place, client) as station:
            self._netlink.request([rtnl.set_up(port, what, up=False)])
            _wait_carrier(station, own, client, up=False)
            self._netlink.request([move, rtnl.set_up(port, what, up=True)])
            _wait_carrier(self._netlink, port, client, up=True)
            _wait_carrier(station, own, client, up=True)


def _wait_carrier(netlink: Netlink, index: int, client: str, *, up: bool) -> None:
    question = rtnl.get_link(index)
    deadline = time.monotonic() + _CARRIER_TIMEOUT_S
    while rtnl.parse_running(netlink.table(question)[0]) != up:
        if time.monotonic() > deadline:
            raise LabError(f"{client} doesn't notice its carrier within {_CARRIER_TIMEOUT_S} s")
        time.sleep(_CARRIER_POLL_S)
