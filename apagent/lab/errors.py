"""What can go wrong with a lab."""

from apagent.errors import ApagentError


class LabError(ApagentError):
    """The lab can't do what was asked; the text says why and what to do."""


class LabNotUp(LabError):
    """There is no lab to work with."""


class UnknownNode(LabError):
    """The lab has no node of that name."""
