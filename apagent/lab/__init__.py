"""A roam domain in network namespaces, for the demo, the tests and whoever wants to try apagent.

`plan` computes the topology, `build` makes it, `lab.Lab` is the way in for Python and
`apagent lab` for the shell.
"""
