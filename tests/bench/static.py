"""What a roamed flow's path is compared with: the same tunnel, made by hand, without any map.

A lab without agents. Everything that the client sends at ap2 goes through a VXLAN tunnel to ap1,
which translates it: a policy rule and four routes, and nothing to look up.
"""

from __future__ import annotations

from apagent.lab.lab import Lab
from apagent.lab.plan import GATEWAY, RADIO
from tests.bench.contenders import CLIENT

_VNI, _PORT, _MTU = 77, 4789, 1450
_NET = "100.127.0"
_MAC = "02:00:00:00:aa:0{}"


def connect(lab: Lab) -> None:
    """Make the tunnel between ap1 and ap2, and let the client's packets take it."""
    for near, far in ((1, 2), (2, 1)):
        _make_end(lab, near, far)
    client = lab.plan.station(CLIENT).address
    _ip(lab, "ap1", f"route add {client}/32 via {_NET}.2 dev vx")
    _ip(lab, "ap2", f"route add default via {_NET}.1 dev vx table 100")
    _ip(lab, "ap2", "rule add iif br-lan lookup 100 priority 100")
    # As apagent clamps it, so that the packets have the same size.
    _ip(lab, CLIENT, f"route change default via {GATEWAY} dev {RADIO} mtu {_MTU}")


def _make_end(lab: Lab, near: int, far: int) -> None:
    ap, mac = f"ap{near}", _MAC.format(far)
    here, there = lab.plan.underlay(ap), lab.plan.underlay(f"ap{far}")
    _ip(
        lab,
        ap,
        f"link add vx address {_MAC.format(near)} mtu {_MTU} type vxlan"
        f" id {_VNI} local {here} dstport {_PORT} nolearning",
    )
    _ip(lab, ap, f"address add {_NET}.{near}/24 dev vx")
    _ip(lab, ap, "link set vx up")
    _ip(lab, ap, f"neighbour add {_NET}.{far} lladdr {mac} dev vx nud permanent")
    lab.run(ap, ["bridge", "fdb", "add", mac, "dev", "vx", "dst", str(there)])


def _ip(lab: Lab, node: str, command: str) -> None:
    lab.run(node, ["ip", *command.split()])
