"""The decisions: synchronous functions of events and time, on the standard library alone."""
