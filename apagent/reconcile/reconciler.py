"""Brings the kernel to the engine's desired state.

In quiet times the engine's deltas go straight to the kernel: what is installed is believed to be
what was wanted at the last success. When the kernel refuses something, belief is worth nothing: the
installed state is read back and the difference applied, again and again until it holds.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Protocol

from apagent.core.desired import NetworkDelta, NetworkState, difference
from apagent.core.domain import Domain
from apagent.core.model import NetworkName
from apagent.errors import KernelFault
from apagent.kernel.port import DataPath

log = logging.getLogger(__name__)


class Desire(Protocol):
    """What the reconciler asks of the engine."""

    def wanted(self) -> Mapping[NetworkName, NetworkState]:
        """The whole desired state."""

    def take_deltas(self) -> Mapping[NetworkName, NetworkDelta]:
        """What changed in it since the last call."""


class Reconciler:
    """Owner of the kernel's state; `fault` says what stands between it and the desired state."""

    def __init__(self, kernel: DataPath, domain: Domain, desire: Desire) -> None:
        self._kernel = kernel
        self._domain = domain
        self._desire = desire
        self.fault: str | None = None
        self.repairs = 0
        """Times that the installed state had to be read back and mended."""

    def flush(self) -> None:
        """Install what changed; if the kernel refuses, mend everything. `fault` says what stays."""
        if self.fault is not None:
            return
        deltas = self._desire.take_deltas()
        if not deltas:
            return
        try:
            self._kernel.apply(deltas)
        except KernelFault as fault:
            log.warning("the kernel refused a change (%s); reading back what is installed", fault)
            self.repair()

    def repair(self) -> bool:
        """Read back what is installed and mend it; returns whether all is as it should be."""
        self.repairs += 1
        try:
            self._kernel.prepare(self._domain)
            self.align(self._kernel.read())
        except KernelFault as fault:
            log.error("the kernel's state can't be mended: %s", fault)  # noqa: TRY400 - no trace
            self.fault = str(fault)
            return False
        self.fault = None
        return True

    def align(self, actual: Mapping[NetworkName, NetworkState]) -> None:
        """Apply the difference between `actual` and what is wanted. Raises KernelFault."""
        self._desire.take_deltas()
        wanted = self._desire.wanted()
        deltas = {name: difference(actual[name], wanted[name]) for name in wanted}
        self._kernel.apply({name: delta for name, delta in deltas.items() if delta})
