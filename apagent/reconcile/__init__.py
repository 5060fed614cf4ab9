"""Desired against installed: makes the kernel what the engine says, and repeats until it is."""

from apagent.reconcile.reconciler import Reconciler

__all__ = ["Reconciler"]
