"""Management of one agent over its unix socket."""
