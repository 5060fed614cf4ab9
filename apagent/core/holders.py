"""Who has a key, where several tables may have it: sessions and sockets of a network's anchors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Generic, TypeVar

from apagent.core.model import ApId

_K = TypeVar("_K")


class Holders(Generic[_K]):
    """Who has a key, of all that have tables.

    Nearly every key is one AP's alone. Of a peer's, one dictionary tells whose, however many APs
    there are; our own are in no dictionary but our table, `own`.
    """

    def __init__(self, me: ApId, own: Mapping[_K, object]) -> None:
        self._me = me
        self._own = own
        self.peer: dict[_K, ApId] = {}
        """A peer that has the key."""
        self.shared: dict[_K, tuple[ApId, ...]] = {}
        """Keys that several have -> who, in the order of ids."""
        self._groups: dict[tuple[ApId, ...], tuple[ApId, ...]] = {}
        """Each such tuple once: there may be many keys."""

    def add(self, ap: ApId, key: _K) -> None:
        """`ap`, which didn't have the key, has it now."""
        others = self.shared.get(key)
        if ap == self._me:
            alone = self.peer.get(key)
        else:
            alone = self.peer.setdefault(key, ap)
            if alone == ap:
                alone = self._me if key in self._own else None
        if others is None and alone is not None:
            others = (alone,)
        if others is not None:
            group = tuple(sorted((*others, ap)))
            self.shared[key] = self._groups.setdefault(group, group)

    def add_alone(self, ap: ApId, keys: Iterable[_K]) -> None:
        """`ap` has these keys now, which nobody had."""
        if ap != self._me:
            self.peer.update(dict.fromkeys(keys, ap))

    def remove_alone(self, ap: ApId, keys: Iterable[_K]) -> None:
        """`ap` has these keys no more, nor has anybody else."""
        if ap != self._me:
            for key in keys:
                del self.peer[key]

    def remove(self, ap: ApId, key: _K) -> None:
        """`ap` has it no more."""
        group = self.shared.get(key)
        if group is None:
            if ap != self._me:
                del self.peer[key]
            return
        left = tuple(other for other in group if other != ap)
        peer = next((other for other in left if other != self._me), None)
        if peer is None:
            del self.peer[key]
        else:
            self.peer[key] = peer
        if len(left) == 1:
            del self.shared[key]
        else:
            self.shared[key] = self._groups.setdefault(left, left)
