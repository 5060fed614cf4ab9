"""`apagent lab`: a roam domain in network namespaces."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from apagent.cli.exit_codes import ExitCode
from apagent.errors import ApagentError
from apagent.lab.errors import LabNotUp, UnknownNode
from apagent.lab.lab import Lab, take_down
from apagent.lab.place import Place
from apagent.lab.status import AgentStatus, LabStatus, NodeStatus, inspect

_DESCRIPTION = """A roam domain in network namespaces: APs that each do their own NAT, clients,
a router and a server. Needs root, or a user namespace (scripts/in-userns COMMAND makes one).
Namespaces are named apl-NODE, state and logs are in /run/apagent-lab; APAGENT_LAB_PREFIX and
APAGENT_LAB_ROOT change that, so that two labs can coexist."""

_EXAMPLES = """examples:
  apagent lab up --aps 3 --clients 2
  apagent lab exec client1 -- ping 198.51.100.10
  apagent lab roam client1 ap2
  apagent lab exec ap1 -- apctl flows
  apagent lab down
"""

_Handler = Callable[[argparse.Namespace], int]
if TYPE_CHECKING:
    # Generic for type checkers only; argparse has no public name for it.
    _Commands = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001


def register(commands: _Commands) -> None:
    """Add `lab` and its subcommands to the command line."""
    lab = commands.add_parser(
        "lab",
        help="a roam domain in network namespaces",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = lab.add_subparsers(dest="action", metavar="ACTION", required=True)
    _register_up(actions)
    _register_roam(actions)
    _register_exec(actions)
    status = _action(actions, "status", "show nodes, agents, and where the clients are", _status)
    _add_output(status)
    _action(actions, "down", "take everything down, also what an interrupted `up` left", _down)


def _register_up(actions: _Commands) -> None:
    up = _action(actions, "up", "build a lab and wait until its agents are in sync", _up)
    up.add_argument("--aps", type=int, default=3, metavar="N", help="access points (default 3)")
    up.add_argument("--clients", type=int, default=2, metavar="M", help="clients (default 2)")
    up.add_argument(
        "--takeover",
        action="store_true",
        help="NAT addresses that another AP takes over, with their flows, when theirs dies",
    )
    up.add_argument(
        "--no-agents",
        action="store_true",
        help="without apagent: every AP does its own NAT the ordinary way",
    )


def _register_roam(actions: _Commands) -> None:
    roam = _action(
        actions, "roam", "associate a client with an AP, as its radio would; tell nobody", _roam
    )
    roam.add_argument("client", metavar="CLIENT", help="such as client1")
    roam.add_argument("ap", metavar="AP", help="such as ap2")
    roam.add_argument(
        "--silent", action="store_true", help="leave out the new AP's Layer 2 Update frame"
    )
    roam.add_argument(
        "--carrier", action="store_true", help="take the client's carrier down and up"
    )
    _add_output(roam)


def _register_exec(actions: _Commands) -> None:
    execute = _action(
        actions, "exec", "run a program in a node; its exit code passes through", _exec
    )
    execute.usage = "apagent lab exec NODE -- COMMAND [ARGUMENT ...]"
    execute.add_argument("node", metavar="NODE", help="internet, server, fabric, ap1, client1, ...")
    execute.add_argument("argv", nargs=argparse.REMAINDER, metavar="COMMAND")


def _action(actions: _Commands, name: str, text: str, handler: _Handler) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(handler=_with_exit_codes(handler))
    return parser


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o", "--output", choices=("table", "json"), default="table", help="default: table"
    )


def _with_exit_codes(handler: _Handler) -> _Handler:
    def handle(arguments: argparse.Namespace) -> int:
        try:
            return handler(arguments)
        except ApagentError as error:
            _report(f"apagent lab: {error}")
            missing = isinstance(error, LabNotUp | UnknownNode)
            return ExitCode.NOT_FOUND if missing else ExitCode.ERROR

    return handle


def _up(arguments: argparse.Namespace) -> int:
    lab = Lab(
        arguments.aps,
        arguments.clients,
        agents=not arguments.no_agents,
        takeover=arguments.takeover,
        place=_place(),
        progress=_report,
    )
    try:
        lab.up()
    except KeyboardInterrupt:
        _report("interrupted: nothing is left of the lab")
        return ExitCode.INTERRUPTED
    lab.close()
    _report(f"up; try `apagent lab exec {lab.nodes[-1]} -- ping 198.51.100.10`")
    return ExitCode.OK


def _roam(arguments: argparse.Namespace) -> int:
    client, ap = arguments.client, arguments.ap
    with contextlib.closing(Lab.open(_place())) as lab:
        old = lab.locations().get(client)
        linked = lab.roam(client, ap, silent=arguments.silent, carrier=arguments.carrier)
    if arguments.output == "json":
        _print(json.dumps({"client": client, "from": old, "to": ap, "link_up_ns": linked}))
    else:
        _print(f"{client}: {old} -> {ap}, link up at {linked} ns (monotonic)")
    return ExitCode.OK


def _exec(arguments: argparse.Namespace) -> int:
    argv = arguments.argv[1:] if arguments.argv[:1] == ["--"] else arguments.argv
    if not argv:
        _report("apagent lab exec: which command? Such as: apagent lab exec ap1 -- apctl status")
        return ExitCode.USAGE
    Lab.open(_place()).replace_by(arguments.node, argv)
    return ExitCode.OK


def _status(arguments: argparse.Namespace) -> int:
    with contextlib.closing(Lab.open(_place())) as lab:
        status = inspect(lab)
    as_json = arguments.output == "json"
    _print(json.dumps(status, indent=2) if as_json else _table(status))
    return ExitCode.OK if status["state"] == "up" else ExitCode.DEGRADED


def _down(_arguments: argparse.Namespace) -> int:
    take_down(_place(), _report)
    return ExitCode.OK


def _table(status: LabStatus) -> str:
    nodes = [(node["node"], _namespace(node), _agent(node["agent"])) for node in status["nodes"]]
    clients = [(c["client"], c["ap"] or "none", c["address"], c["mac"]) for c in status["clients"]]
    lines = [
        f"lab {status['state']}: namespaces {status['prefix']}*, state in {status['root']}",
        "",
    ]
    lines += _aligned([("NODE", "NAMESPACE", "AGENT"), *nodes])
    lines += ["", *_aligned([("CLIENT", "AP", "ADDRESS", "MAC"), *clients])]
    return "\n".join(lines)


def _namespace(node: NodeStatus) -> str:
    return node["namespace"] if node["present"] else f"{node['namespace']} is missing"


def _agent(agent: AgentStatus | None) -> str:
    if agent is None:
        return "-"
    if not agent["alive"]:
        return "not running"
    answer = {True: "in sync", False: "not in sync", None: "does not answer"}[agent["in_sync"]]
    return f"{answer}, pid {agent['pid']}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


def _place() -> Place:
    return Place.from_environment(os.environ)


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _report(text: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # a lab is taken down also when nobody listens
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
