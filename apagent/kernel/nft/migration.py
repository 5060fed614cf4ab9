"""What a set of another layout holds, carried over into the set that takes its place.

A set's definition is its layout: a change of what elements mean comes with another definition or
another name, and with a migration here. What has no migration and isn't laid out in the same way is
emptied: peers' flows are missing then until their APs have sent them again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from apagent.core.domain import Domain
from apagent.core.model import ApId
from apagent.kernel.nft.chain import number_in
from apagent.kernel.nft.elements import ElementChange, pack_data, pack_socket, pack_target
from apagent.kernel.nft.installed import Installed
from apagent.kernel.nft.messages import SET_FLAG_TIMEOUT, VERDICT, SetDefinition
from apagent.kernel.nft.prerouting import DSTNAT
from apagent.kernel.nft.sets import ANCHOR_CHAIN, Names, anchor_number

log = logging.getLogger(__name__)

Elements = Mapping[bytes, bytes]
"""Key and value (empty in a set) as the kernel has them."""
Convert = Callable[[bytes, bytes], Iterable[tuple[bytes, bytes]]]
"""From an element to those that take its place."""


class Former(NamedTuple):
    """A former definition of a network's set."""

    suffix: str
    """Its name without the network's."""
    key_length: int
    data_length: int


class Migration(NamedTuple):
    """What becomes of a former set's elements."""

    suffix: str
    """Of the set that holds them now."""
    convert: Convert


MIGRATIONS: Mapping[Former, Migration] = {}
"""Since revision 4db3919, the first one, no session map has changed its layout."""


def forwards_in_rules(domain: Domain, installed: Installed) -> list[ElementChange]:
    """Port forwards of addresses that move, which were rules up to revision c391e4c.

    There at once in the map that takes their place. Whether the address is here, and the map to
    have them, is seen right after.
    """
    if DSTNAT not in installed.chains:
        return []
    return [
        ElementChange(
            map_, pack_socket(outside), deleted=False, data=pack_data(pack_target(inside))
        )
        for network in domain.networks
        if network.lets_forwards_move
        and (map_ := Names.of(network.name).forwards) not in installed.sets
        for outside, inside in network.forwarded.items()
    ]


class Move(NamedTuple):
    """The elements of the installed set `source` belong into the new set `target`."""

    source: SetDefinition
    target: SetDefinition
    convert: Convert

    def changes(self, elements: Elements) -> list[ElementChange]:
        """What puts them there."""
        return [
            ElementChange(
                self.target.name, key, deleted=False, data=pack_data(value) if value else b""
            )
            for old in elements.items()
            for key, value in self.convert(*old)
        ]


def as_it_is(key: bytes, value: bytes) -> Iterable[tuple[bytes, bytes]]:
    """For a set that is laid out in the same way."""
    return ((key, value),)


def anchor_numbers(installed: Installed) -> dict[ApId, int]:
    """The anchors' numbers in an installed table.

    Revision 4db3919 had them in its verdict maps alone, whose elements always led to the anchor's
    own chain. Since then they stand in the chains' comments.
    """
    numbers: dict[ApId, int] = {}
    for elements in installed.verdicts.values():
        for value, name in elements.items():
            number = anchor_number(value)
            if number is not None and name.startswith(ANCHOR_CHAIN):
                numbers[ApId(name.removeprefix(ANCHOR_CHAIN))] = number
    for name, comments in installed.comments.items():
        number = number_in(comments[0])
        if number is not None and name.startswith(ANCHOR_CHAIN):
            numbers[ApId(name.removeprefix(ANCHOR_CHAIN))] = number
    return numbers


def moves(
    domain: Domain,
    installed: Mapping[str, SetDefinition],
    wanted: Mapping[str, SetDefinition],
    migrations: Mapping[Former, Migration] = MIGRATIONS,
) -> list[Move]:
    """What to carry over before the `wanted` sets take the place of the `installed` ones.

    Says in the log which sets are emptied. Elements that expire, and verdicts, which are a function
    of the roam domain, are made anew.
    """
    found: list[Move] = []
    for name, source in installed.items():
        if wanted.get(name) == source or _is_made_anew(source):
            continue
        move = _known_move(domain, source, wanted, migrations) or _same(source, wanted.get(name))
        if move is None and name in wanted and not _is_made_anew(wanted[name]):
            log.warning("%s is of a layout that this release doesn't know, and is emptied", name)
        # What is there already has been brought up to date by whoever made it.
        if move is not None and move.target != installed.get(move.target.name):
            found.append(move)
    return found


def _is_made_anew(definition: SetDefinition) -> bool:
    return bool(definition.extra_flags & SET_FLAG_TIMEOUT) or definition.data_type == VERDICT


def _known_move(
    domain: Domain,
    source: SetDefinition,
    wanted: Mapping[str, SetDefinition],
    migrations: Mapping[Former, Migration],
) -> Move | None:
    for network in domain.networks:
        prefix = f"{network.name}_"
        suffix = source.name.removeprefix(prefix)
        known = migrations.get(Former(suffix, source.key_length, source.data_length))
        target = wanted.get(prefix + known.suffix) if known else None
        if known is not None and target is not None and source.name.startswith(prefix):
            return Move(source, target, known.convert)
    return None


def _same(source: SetDefinition, target: SetDefinition | None) -> Move | None:
    if target is None or _is_made_anew(target):
        return None
    if (source.key_length, source.data_length) != (target.key_length, target.data_length):
        return None
    return Move(source, target, as_it_is)
