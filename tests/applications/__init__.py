"""Real applications between a client and the server, for tests and the soak.

A module each: a context manager starts the application, which then runs until it is told to finish
and says what the roams have cost it. Programs that are not on every machine are in `programs`.
"""
