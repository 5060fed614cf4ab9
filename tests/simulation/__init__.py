"""Whole roam domains as one deterministic computation: engines, feeds, a bad network, no sleeping.

A scenario is drawn from a seed: how large the domain is, and a script of steps (`scenario`). The
world (`world`) carries the steps out, with the real engines and feed logs, and with kernels,
clients and networks made of dictionaries. Then everything heals and comes to rest, and what must
hold is checked (`invariants`). The same seed gives the same run, on any machine.
"""
