"""Where packets go whose anchor is dead, or whose flow nobody knows: the verdict maps' elements.

A network's anchor map leads from each peer's value to the peer's chain. A diverted peer's element
leads to another one's, or is missing, so that the packet goes on to conntrack here. Packets that no
map knows have a value of their own; where another AP anchors new flows, it leads to the chain that
judges them (`prerouting.new`), and in that chain's map to the AP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from apagent.core.desired import ANY_ANCHOR, NOBODY
from apagent.core.domain import Domain
from apagent.core.model import ApId
from apagent.kernel.nft import messages
from apagent.kernel.nft.expressions import goto_data, jump_data
from apagent.kernel.nft.installed import read_verdicts
from apagent.kernel.nft.sets import ANCHOR_CHAIN, Names, anchor_chain, anchor_value, any_anchor
from apagent.kernel.port import Change, NetworkDelta
from apagent.kernel.wire import Message, Netlink


def read_diverted(netlink: Netlink, domain: Domain, names: Names) -> dict[ApId, ApId]:
    """The anchors of a network that are diverted, as `NetworkState` has them.

    Raises KernelFault.
    """
    table = domain.table
    anchors = read_verdicts(netlink, table, names.anchors)
    new = read_verdicts(netlink, table, names.new_anchor).get(any_anchor())
    found = {peer.id: _leads_to(anchors.get(anchor_value(peer.number))) for peer in domain.peers}
    diverted = {peer: ap for peer, ap in found.items() if ap != peer}
    if new is not None and any_anchor() in anchors:
        diverted[ANY_ANCHOR] = _leads_to(new)
    return diverted


def diversion(
    domain: Domain, names: Names, changes: Mapping[ApId, Change[ApId]]
) -> Iterator[Message]:
    """The messages of a transaction that diverts anchors, or no longer does."""
    for anchor, change in changes.items():
        if anchor == ANY_ANCHOR:
            yield from _divert_new(domain.table, names, change)
        else:
            key = anchor_value(domain.peer_by_id[anchor].number)
            old = anchor if change.old is None else change.old
            new = anchor if change.new is None else change.new
            yield from _divert(domain.table, names.anchors, key, old or None, new or None)


def waiting(delta: NetworkDelta) -> set[ApId]:
    """Which of the diverted anchors wait until the session maps have changed.

    To divert an anchor leads all of its flows elsewhere at once, so it comes first. But where some
    of them go to another AP than the others, since a dead anchor's addresses have two successors,
    each needs its own element before: the wrong one would translate it anew. New flows go elsewhere
    when ours are in the maps, so that none of ours is taken for new.
    """
    if not delta.diverted:
        return set()
    moved = {(change.old, change.new or NOBODY) for change in delta.flows.values()}
    parted = {
        anchor
        for anchor, to in moved
        if anchor in delta.diverted and delta.diverted[anchor].new not in (None, to)
    }
    opens_elsewhere = {a for a, c in delta.diverted.items() if a == ANY_ANCHOR and c.new}
    return parted | opens_elsewhere


def _divert(
    table: str, map_: str, key: bytes, old: ApId | None, new: ApId | None
) -> Iterator[Message]:
    """Let `key` lead to another anchor's chain than before; None: to nobody's."""
    if old is not None:
        yield messages.delete_verdict(table, map_, key)
    if new is not None:
        yield messages.new_verdict(table, map_, key, goto_data(anchor_chain(new)))


def _divert_new(table: str, names: Names, change: Change[ApId]) -> Iterator[Message]:
    key = any_anchor()
    if change.new is None:
        yield messages.delete_verdict(table, names.anchors, key)
    yield from _divert(table, names.new_anchor, key, change.old, change.new)
    if change.old is None:
        yield messages.new_verdict(table, names.anchors, key, jump_data(names.new))


def _leads_to(chain: str | None) -> ApId:
    return NOBODY if chain is None else ApId(chain.removeprefix(ANCHOR_CHAIN))
