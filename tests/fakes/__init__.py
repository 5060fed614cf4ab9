"""Doubles of what the agent is built on: the same contracts, in memory."""
