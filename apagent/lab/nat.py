"""What an AP without apagent does: an ordinary masquerade.

As nft prints it:

    table inet lab_nat {
        chain srcnat {
            type nat hook postrouting priority srcnat; policy accept;
            oifname "wan" masquerade
        }
    }
"""

from __future__ import annotations

from apagent.kernel.nft.expressions import masquerade, oifname
from apagent.kernel.nft.messages import BEGIN, END, Hook, new_chain, new_rule, new_table
from apagent.kernel.wire import Netlink

_NETLINK_NETFILTER = 12
_TABLE, _CHAIN = "lab_nat", "srcnat"
_NF_INET_POST_ROUTING = 4
_NF_IP_PRI_NAT_SRC = 100
"""linux/netfilter.h and linux/netfilter_ipv4.h; OpenWrt's fw4 translates at the same place."""


def translate(uplink: str) -> None:
    """Masquerade what leaves by `uplink` in the namespace that this thread is in."""
    hook = Hook("nat", _NF_INET_POST_ROUTING, _NF_IP_PRI_NAT_SRC)
    ruleset = [
        new_table(_TABLE, 0),
        new_chain(_TABLE, _CHAIN, hook),
        new_rule(_TABLE, _CHAIN, (*oifname(uplink), *masquerade())),
    ]
    netlink = Netlink(_NETLINK_NETFILTER)
    try:
        netlink.transaction(BEGIN, ruleset, END)
    finally:
        netlink.close()
