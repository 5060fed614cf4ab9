"""Everything breaks, at random but from a seed: `make chaos`, or `python -m tests.chaos`."""
