"""What can go wrong, by whose fault it is.

An error's text is for the person who reads it: what is wrong, where (config key, interface,
peer) and what to do about it.
"""


class ApagentError(Exception):
    """Base of every error that apagent raises on purpose."""


class ConfigError(ApagentError):
    """The configuration can't be used; the text starts with the key's full name."""


class NeedsError(ApagentError):
    """The machine lacks something that the agent can't run without."""


class PeerFault(ApagentError):
    """A peer sent something that it may not send; it is refused, counted and logged."""


class KernelFault(ApagentError):
    """The kernel refused an operation.

    `errno` is the kernel's code (positive), or 0 if there was none.
    """

    def __init__(self, text: str, errno: int = 0) -> None:
        super().__init__(text)
        self.errno = errno


class EventsLost(KernelFault):
    """A netlink socket overflowed (ENOBUFS): events are missing, read the whole table again."""


class NotReady(ApagentError):
    """The management call needs an agent that is in sync."""


class UnknownClient(ApagentError):
    """The management call names a client that no AP has seen."""
