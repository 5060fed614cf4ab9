"""The tests of apagent."""
