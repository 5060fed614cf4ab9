"""The feed between agents: every AP subscribes to every peer's sessions and client claims."""
