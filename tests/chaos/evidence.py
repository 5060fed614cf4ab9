"""What a person wants to see of a run that failed: logs, and what every AP's kernel holds."""

from __future__ import annotations

import shutil
from pathlib import Path

from apagent.lab.lab import Lab
from apagent.lab.plan import UPLINK

_COMMANDS = (
    ("apctl", "status"),
    ("apctl", "peers"),
    ("apctl", "clients"),
    ("apctl", "flows"),
    ("nft", "list", "ruleset"),
    ("conntrack", "-L"),
    ("ip", "address", "show", "dev", UPLINK),
    ("ip", "rule"),
    ("ip", "route", "show", "table", "all"),
    ("ip", "neigh"),
    ("bridge", "fdb"),
)


def keep_state(lab: Lab, out: Path) -> None:
    """Write what every AP knows and holds now to OUT/AP.state."""
    for ap in lab.aps:
        with (out / f"{ap}.state").open("w", encoding="utf-8") as file:
            for command in _COMMANDS:
                result = lab.run(ap, command, check=False)
                file.write(f"# {' '.join(command)}\n{result.stdout}{result.stderr}\n")


def errors(lab: Lab) -> list[str]:
    """What no agent should ever log."""
    return [
        f"{ap}: {line}"
        for ap in lab.aps
        for line in lab.agents.log(ap).read_text(encoding="utf-8", errors="replace").splitlines()
        if line.startswith("Traceback") or " CRITICAL " in line
    ]


def keep_logs(lab: Lab, out: Path) -> None:
    """Copy every agent's log to OUT/AP.log."""
    for ap in lab.aps:
        shutil.copyfile(lab.agents.log(ap), out / f"{ap}.log")
