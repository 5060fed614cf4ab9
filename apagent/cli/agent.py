"""The `apagent` command: run the agent, check its configuration, clean up, and the lab."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from apagent import __version__
from apagent.cli import demo, lab
from apagent.cli.exit_codes import ExitCode
from apagent.config import DEFAULT_PATH, load
from apagent.errors import ApagentError

_EXAMPLES = """examples:
  apagent check-config /etc/apagent/agent.toml
  apagent run
  apagent run --config ./ap1.toml
  apagent cleanup
  apagent lab up --aps 3 --clients 2
  apagent demo
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.handler(arguments)
    except ApagentError as error:
        print(f"apagent: {error}", file=sys.stderr)
        return ExitCode.ERROR
    except KeyboardInterrupt:
        return ExitCode.ERROR
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="apagent",
        description="Wi-Fi clients keep their connections when they roam between NATing APs.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"apagent {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    run = commands.add_parser(
        "run",
        help="run the agent of this AP in the foreground",
        description="Run the agent of this AP in the foreground until SIGTERM or SIGINT. "
        "Forwarding goes on when it stops.",
    )
    _add_config(run)
    run.set_defaults(handler=_run)

    check = commands.add_parser(
        "check-config",
        help="check a configuration file without starting",
        description="Check a configuration file, and that its interfaces exist, without starting. "
        "Exits with 4 if only an interface is missing.",
    )
    check.add_argument("file", nargs="?", type=Path, default=DEFAULT_PATH, metavar="FILE")
    check.set_defaults(handler=_check_config)

    cleanup = commands.add_parser(
        "cleanup",
        help="remove everything that is ours from the kernel",
        description="Remove everything that is ours from the kernel, and nothing else. "
        "Flows that are anchored or tunnelled here break. Stop the agent first.",
    )
    _add_config(cleanup)
    cleanup.set_defaults(handler=_cleanup)

    lab.register(commands)
    demo.register(commands)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, default=DEFAULT_PATH, metavar="FILE", help=f"default: {DEFAULT_PATH}"
    )


def _run(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    from apagent import app  # noqa: PLC0415 - gRPC reads its environment when it is imported

    config = load(arguments.config)
    logging.basicConfig(
        level=config.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    asyncio.run(app.run(config))
    return ExitCode.OK


def _check_config(arguments: argparse.Namespace) -> int:
    from apagent.kernel.needs import missing_interfaces  # noqa: PLC0415 - netlink only where used

    config = load(arguments.file)
    missing = missing_interfaces(config.domain({}, 1450))
    for text in missing:
        print(f"apagent: {arguments.file}: {text}", file=sys.stderr)
    if missing:
        return ExitCode.DEGRADED
    peers = ", ".join(peer.id for peer in config.peers) or "none"
    networks = ", ".join(network.name for network in config.networks)
    print(f"{arguments.file}: ok: {config.ap}; peers: {peers}; networks: {networks}")
    return ExitCode.OK


def _cleanup(arguments: argparse.Namespace) -> int:
    from apagent import app  # noqa: PLC0415 - as above
    from apagent.kernel.linux import LinuxDataPath  # noqa: PLC0415 - as above

    with contextlib.closing(LinuxDataPath()) as kernel:
        removed = kernel.remove(app.known_domain(load(arguments.config), kernel))
    for line in removed:
        print(f"removed {line}")
    if not removed:
        print("nothing of ours is installed")
    return ExitCode.OK
