"""Brings the kernel to the engine's desired state, and back to it.

In quiet times the engine's deltas go straight to the kernel: what is installed is believed to be
what was wanted at the last success. When the kernel refuses something, belief is worth nothing: the
installed state is read back and the difference applied, again and again until it holds. The same is
done when others may have changed it, and what is right is not touched.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Protocol

from apagent.core.desired import NetworkDelta, NetworkState, difference
from apagent.core.domain import Domain
from apagent.core.model import NetworkName
from apagent.errors import KernelFault
from apagent.kernel.port import DataPath

log = logging.getLogger(__name__)

_NAMED = 4
"""How much of what was mended is told one by one."""


class Desire(Protocol):
    """What the reconciler asks of the engine."""

    in_sync: bool
    """Whether the kernel may stop holding back what could belong to a peer's flow."""

    def wanted(self, *, session_maps: bool = True) -> Mapping[NetworkName, NetworkState]:
        """The whole desired state; flows and sockets only with `session_maps`."""

    def take_deltas(self) -> Mapping[NetworkName, NetworkDelta]:
        """What changed in it since the last call."""

    def drop_deltas(self) -> None:
        """Forget what changed in it: the whole of it is compared."""


class Reconciler:
    """Owner of the kernel's state; `fault` says what stands between it and the desired state."""

    def __init__(self, kernel: DataPath, domain: Domain, desire: Desire) -> None:
        self._kernel = kernel
        self._domain = domain
        self._desire = desire
        self._believed = True
        """Whether the dynamic state is installed as it was wanted last."""
        self._holds = False
        """Whether a table made anew holds back, though we may be in sync."""
        self.fault: str | None = None
        self.repairs = 0
        """Times that something was found to be wrong in the kernel, and mended."""

    def flush(self) -> None:
        """Install what changed; if the kernel refuses, mend everything. `fault` says what stays."""
        deltas = self._desire.take_deltas()
        if not deltas:
            return
        try:
            self._kernel.apply(deltas)
        except KernelFault as fault:
            # While a fault stands, what the kernel takes is a gain, and the next repair tells.
            if self._believed:
                log.warning("the kernel refused a change (%s); reading back its state", fault)
                self.repair()

    def repair(self) -> bool:
        """Read everything back and mend it; returns whether all is as it should be."""
        return self.check(session_maps=True)

    def check(self, *, session_maps: bool) -> bool:
        """Read back what is installed and mend it; returns whether all is as it should be.

        Without `session_maps` flows and sockets are taken on trust, unless a fault stands.
        """
        whole = session_maps or not self._believed
        if not whole:
            self.flush()
        mended: list[str] = []
        faults: list[KernelFault] = []
        for step in (self._check_static, partial(self._check_dynamic, session_maps=whole)):
            try:
                step(mended)
            except KernelFault as fault:
                faults.append(fault)
        if mended:
            self.repairs += 1
            log.warning("mended in the kernel: %s", _summary(mended))
        self._note(faults)
        return not faults

    def align(
        self, actual: Mapping[NetworkName, NetworkState], *, session_maps: bool = True
    ) -> list[str]:
        """Apply the difference between `actual` and what is wanted; what that was, a line each.

        Raises KernelFault.
        """
        self._desire.drop_deltas()
        wanted = self._desire.wanted(session_maps=session_maps)
        deltas = {name: difference(actual[name], wanted[name]) for name in wanted}
        self._kernel.apply({name: delta for name, delta in deltas.items() if delta})
        return [line for name, delta in deltas.items() for line in _described(name, delta)]

    def _check_static(self, mended: list[str]) -> None:
        prepared = self._kernel.prepare(self._domain)
        mended += (*prepared.objects, *prepared.sysctls)
        self._holds = self._holds or prepared.fresh

    def _check_dynamic(self, mended: list[str], *, session_maps: bool) -> None:
        self._believed = False
        actual = self._kernel.read(session_maps=session_maps)
        mended += self.align(actual, session_maps=session_maps)
        self._believed = True
        # A table made anew holds back; its maps are filled now, and what the others sent is here.
        if self._holds and self._desire.in_sync:
            self._kernel.release_hold()
        self._holds = False

    def _note(self, faults: Sequence[KernelFault]) -> None:
        before, self.fault = self.fault, str(faults[0]) if faults else None
        if self.fault is not None and self.fault != before:
            log.error("the kernel's state can't be mended: %s", self.fault)
        if self.fault is None and before is not None:
            log.info("the kernel's state is as it should be again")


def _described(network: NetworkName, delta: NetworkDelta) -> list[str]:
    changed = ((field.name, len(getattr(delta, field.name))) for field in fields(delta))
    return [f"{count} {name} of network {network}" for name, count in changed if count]


def _summary(mended: Iterable[str]) -> str:
    kinds = Counter(mended)
    named = [f"{what} ({count} times)" if count > 1 else what for what, count in kinds.items()]
    rest = len(named) - _NAMED
    return ", ".join(named[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
