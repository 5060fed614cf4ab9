"""The kernel adapters: the only package that imports pyroute2."""
