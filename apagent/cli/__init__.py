"""The command line: apagent and apctl.

gRPC reads its environment when it is first imported, which is after this.
"""

import os

# Nothing here forks; without this gRPC's fork handlers are in the way of whoever starts a process.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# What goes wrong is told by the status of the call; the library's own lines would be noise.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
