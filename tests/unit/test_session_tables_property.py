"""Whatever happens to the tables, what is noted as touched leads the kernel to what is desired."""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import TypeVar

from hypothesis import given
from hypothesis import strategies as st

from apagent.core.model import ApId, Flow, FlowKey, Nat, SocketKey
from apagent.core.session_tables import AnchorRules, SessionTables
from tests.domains import ANN_IP, AP1, AP2, AP3, NAT, at, tcp, udp

K = TypeVar("K")

APS = (AP1, AP2, AP3)
FORWARD = Flow(17, ANN_IP, 5000, IPv4Address(0), 0).key
KEYS = (tcp(1), udp(5000), udp(5000, remote="198.51.100.11"), udp(5001), FORWARD)
NATS = (None, at(4), at(5), NAT)

change = st.tuples(st.sampled_from(APS), st.sampled_from(KEYS), st.sampled_from(NATS))
rules = st.builds(
    AnchorRules,
    dead=st.frozensets(st.sampled_from((AP1, AP3))),
    holders=st.dictionaries(st.just(NAT[:4]), st.sampled_from(APS)),
    prepared=st.frozensets(st.just(NAT[:4])),
    exposed=st.booleans(),
)
batch = st.one_of(st.lists(change, min_size=1, max_size=4), rules)


def follow(installed: dict[K, ApId], touched: dict[K, ApId | None], now: dict[K, ApId]) -> None:
    """Change what is installed as the kernel would be changed."""
    for key, before in touched.items():
        assert before == installed.get(key)
        if key in now:
            installed[key] = now[key]
        else:
            installed.pop(key, None)
    touched.clear()
    assert installed == now


@given(st.lists(batch, max_size=12))
def test_touched_leads_to_desired(
    batches: list[list[tuple[ApId, FlowKey, Nat | None]] | AnchorRules],
) -> None:
    t = SessionTables(AP2, [AP1, AP3])
    flows: dict[FlowKey, ApId] = {}
    sockets: dict[SocketKey, ApId] = {}
    for one in batches:
        if isinstance(one, AnchorRules):
            t.judge_by(one)
        else:
            for ap, key, nat in one:
                t.apply(ap, {key: nat})
        desired = t.desired_flows()
        assert desired == {k: a for k in KEYS[:-1] if (a := t.anchor(k)) is not None}
        follow(flows, t.touched_flows, desired)
        follow(sockets, t.touched_sockets, t.desired_sockets())
        counted = {ap: len(t.table(ap).keys() - {FORWARD}) for ap in APS}
        assert t.flows_of(ANN_IP.packed) == {ap: count for ap, count in counted.items() if count}
