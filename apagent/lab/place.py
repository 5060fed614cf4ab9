"""Where a lab lives: the prefix of its namespaces and its state directory.

Two labs with different prefixes coexist.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from apagent.lab.errors import LabError

PREFIX_VARIABLE = "APAGENT_LAB_PREFIX"
ROOT_VARIABLE = "APAGENT_LAB_ROOT"
DEFAULT_PREFIX = "apl-"
_DEFAULT_ROOT = "/run/apagent-lab"

_PREFIX = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*-")
_NODE = r"(?:internet|server|fabric|ap[0-9]+|client[0-9]+)"
_SOCKET_PATH_MAX = 107
"""Longest path of a unix socket, without its final zero (sun_path in unix(7))."""
_LONGEST_SOCKET = "ap100/control.sock"


@dataclass(frozen=True, slots=True)
class Place:
    """The prefix of a lab's namespaces (`apl-`), and the directory with its state and logs."""

    prefix: str
    root: Path

    @classmethod
    def of(cls, prefix: str = DEFAULT_PREFIX, root: str = "") -> Place:
        """Check both; an empty root is derived from the prefix. Raises LabError."""
        if not _PREFIX.fullmatch(prefix):
            raise LabError(
                f"{PREFIX_VARIABLE}: {prefix!r} can't start a namespace's name; use lower-case "
                "letters, digits and single dashes, a dash at the end, such as 'mylab-'"
            )
        suffix = "" if prefix == DEFAULT_PREFIX else "-" + prefix.rstrip("-")
        path = Path(root or _DEFAULT_ROOT + suffix)
        if not path.is_absolute():
            raise LabError(f"{ROOT_VARIABLE}: {str(path)!r} is not an absolute path")
        if len(str(path / _LONGEST_SOCKET)) > _SOCKET_PATH_MAX:
            raise LabError(
                f"{ROOT_VARIABLE}: {str(path)!r} is too long for the unix sockets in it; "
                f"use at most {_SOCKET_PATH_MAX - len(_LONGEST_SOCKET) - 1} characters"
            )
        return cls(prefix, path)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Place:
        """The place that the two variables name, by default `apl-` and /run/apagent-lab."""
        prefix = environment.get(PREFIX_VARIABLE) or DEFAULT_PREFIX
        return cls.of(prefix, environment.get(ROOT_VARIABLE, ""))

    def namespace(self, node: str) -> str:
        """Name of a node's namespace."""
        return self.prefix + node

    def owns(self, namespace: str) -> bool:
        """Whether a namespace of this name is one of ours.

        A longer prefix that starts like ours is another lab's: `apl-b-ap1` is not in `apl-`.
        """
        return re.fullmatch(re.escape(self.prefix) + _NODE, namespace) is not None

    def ap_directory(self, ap: str) -> Path:
        """Where an AP's configuration, log, pid file and sockets are."""
        return self.root / ap

    def control_socket(self, ap: str) -> Path:
        """The AP's control socket."""
        return self.ap_directory(ap) / "control.sock"

    @property
    def state_file(self) -> Path:
        """What the lab consists of, written before any of it is made."""
        return self.root / "lab.json"
