"""The command lines: parse, call, render."""
