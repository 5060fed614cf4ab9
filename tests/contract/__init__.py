"""One suite a contract, against the fake and the real kernel."""
