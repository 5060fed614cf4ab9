"""From what is installed to what should be, in one transaction.

Packets see the old table or the new one, nothing between. What is right already is left alone:
session maps keep their elements, chains their rules, counters their counts. So do the verdict maps,
which are dynamic too: an element stays if anchors and chains of its kind are still what they were,
and one that is missing stays so. Only an anchor whose chain is made anew begins undiverted.
"""

from __future__ import annotations

from collections.abc import Iterator

from apagent.kernel.nft import messages
from apagent.kernel.nft.chain import Chain
from apagent.kernel.nft.expressions import goto_data
from apagent.kernel.nft.installed import Installed
from apagent.kernel.nft.ruleset import Ruleset
from apagent.kernel.nft.sets import Names, any_anchor
from apagent.kernel.wire import Message


def plan(ruleset: Ruleset, installed: Installed) -> list[Message]:
    """The transaction's messages; none: all is right already."""
    rewritten = _rewritten_chains(ruleset, installed)
    return [
        *_deletions(ruleset, installed, rewritten),
        *_additions(ruleset, installed, rewritten),
    ]


def _redefined_sets(ruleset: Ruleset, installed: Installed) -> list[str]:
    """Installed sets that should not be, or not as they are."""
    return [
        name for name, definition in installed.sets.items() if ruleset.sets.get(name) != definition
    ]


def _gone_chains(ruleset: Ruleset, installed: Installed) -> list[str]:
    """Installed chains that should not be, or not at the hook where they are."""
    return [
        name
        for name, hook in installed.chains.items()
        if name not in ruleset.chains or ruleset.chains[name].hook != hook
    ]


def _rewritten_chains(ruleset: Ruleset, installed: Installed) -> list[Chain]:
    """Chains whose rules have to be added: all of them if a set that they name is made anew."""
    anew = any(name in ruleset.sets for name in _redefined_sets(ruleset, installed))
    gone = set(_gone_chains(ruleset, installed))
    return [
        chain
        for chain in ruleset.chains.values()
        if anew or chain.name in gone or not _is_installed(chain, ruleset, installed)
    ]


def _is_installed(chain: Chain, ruleset: Ruleset, installed: Installed) -> bool:
    comments = installed.comments.get(chain.name, [])
    if not chain.rules:
        return chain.name in installed.chains and not comments
    return (
        len(comments) == len(chain.rules) and comments[0] == ruleset.rules[chain.name].fingerprint
    )


def _deletions(ruleset: Ruleset, installed: Installed, rewritten: list[Chain]) -> Iterator[Message]:
    """Rules first, then what they refer to."""
    table = ruleset.domain.table
    gone = _gone_chains(ruleset, installed)
    flushed = {chain.name for chain in rewritten if chain.name in installed.chains}
    for name in sorted(flushed.union(gone)):
        yield messages.flush_chain(table, name)
    kept = _kept_verdicts(ruleset, installed, rewritten)
    for map_, elements in installed.verdicts.items():
        for key in elements.keys() - kept.get(map_, set()):
            yield messages.delete_verdict(table, map_, key)
    for name in _redefined_sets(ruleset, installed):
        yield messages.delete_set(table, name)
    for name in gone:
        yield messages.delete_chain(table, name)
    for name in installed.counters.difference(ruleset.counters):
        yield messages.delete_counter(table, name)


def _kept_verdicts(
    ruleset: Ruleset, installed: Installed, rewritten: list[Chain]
) -> dict[str, set[bytes]]:
    """The elements of each verdict map that may stay as they are.

    Packets that no map knows take two of them, one in each of a network's maps: both or neither.
    """
    anew = {chain.name for chain in rewritten}
    kept: dict[str, set[bytes]] = {}
    for network in ruleset.domain.networks:
        names = Names.of(network.name)
        anchors, new = (_present(ruleset, installed, m) for m in (names.anchors, names.new_anchor))
        wanted = ruleset.anchors[names.anchors]
        kept[names.anchors] = {
            key for key in anchors if wanted.get(key, names.new) not in {names.new, *anew}
        }
        if any_anchor() in anchors.keys() & new.keys():
            kept[names.anchors].add(any_anchor())
            kept[names.new_anchor] = {any_anchor()}
    return kept | {map_: _right_places(ruleset, installed, map_) for map_ in ruleset.places}


def _right_places(ruleset: Ruleset, installed: Installed, map_: str) -> set[bytes]:
    present = _present(ruleset, installed, map_)
    return {key for key, chain in ruleset.places[map_].items() if present.get(key) == chain}


def _present(ruleset: Ruleset, installed: Installed, map_: str) -> dict[bytes, str]:
    """The elements of a verdict map that lead to chains which stay."""
    if map_ in _redefined_sets(ruleset, installed):
        return {}
    elements = installed.verdicts.get(map_, {})
    return {key: chain for key, chain in elements.items() if chain in ruleset.chains}


def _additions(ruleset: Ruleset, installed: Installed, rewritten: list[Chain]) -> Iterator[Message]:
    """What is referred to first, rules last."""
    table = ruleset.domain.table
    gone = set(_gone_chains(ruleset, installed))
    for name in ruleset.counters:
        if name not in installed.counters:
            yield messages.new_counter(table, name)
    for chain in ruleset.chains.values():
        if chain.name in gone or chain.name not in installed.chains:
            yield messages.new_chain(table, chain.name, chain.hook)
    for set_id, definition in enumerate(ruleset.sets.values(), start=1):
        if installed.sets.get(definition.name) != definition:
            yield messages.new_set(table, definition, set_id)
    yield from _new_verdicts(ruleset, installed, rewritten)
    for chain in rewritten:
        yield from ruleset.rules[chain.name].messages


def _new_verdicts(
    ruleset: Ruleset, installed: Installed, rewritten: list[Chain]
) -> Iterator[Message]:
    anew = {chain.name for chain in rewritten}
    for map_, elements in ruleset.anchors.items():
        fresh = map_ not in installed.sets or map_ in _redefined_sets(ruleset, installed)
        for key, chain in elements.items():
            if fresh or chain in anew:
                yield messages.new_verdict(ruleset.domain.table, map_, key, goto_data(chain))
    for map_, elements in ruleset.places.items():
        for key in elements.keys() - _right_places(ruleset, installed, map_):
            yield messages.new_verdict(ruleset.domain.table, map_, key, goto_data(elements[key]))
