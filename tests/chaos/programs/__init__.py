"""The two ends of all flows: a process each, `python -m tests.chaos.programs.NAME`.

Timestamps are CLOCK_MONOTONIC in nanoseconds.
"""

TCP_PORT = 9001
UDP_PORT = 9002
EVERY_S = 0.1
"""Between two messages of a flow."""
