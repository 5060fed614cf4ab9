"""`apagent demo`: the main job, shown: a download that lives on while its client roams."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from apagent.cli.exit_codes import ExitCode
from apagent.errors import ApagentError

if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULT_SIZE_MB = 48.0


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to `commands`."""
    parser = commands.add_parser(
        "demo",
        help="a download while its client roams over three APs, without and with apagent",
        description="Build three APs and a client in network namespaces, download a file while the "
        "client roams, first without apagent and then with it, and report. Takes half a minute. "
        "Needs root, or `scripts/in-userns apagent demo`.",
    )
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="where reports go")
    parser.add_argument(
        "--size-mb", type=_size, default=DEFAULT_SIZE_MB, help="of the file (%(default)s)"
    )
    parser.set_defaults(handler=_demo)


def _size(text: str) -> float:
    size = float(text)
    if not 1 <= size <= 2000:
        raise argparse.ArgumentTypeError(f"{text} is not between 1 and 2000 (MB)")
    return size


def _demo(arguments: argparse.Namespace) -> int:
    from apagent.lab import demo, report  # noqa: PLC0415 - an AP's agent has no use for the lab

    try:
        # Before the work of a minute.
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(arguments.out, error) from None
    outcome = demo.run(demo.Plan(int(arguments.size_mb * 1e6)), _progress())
    try:
        written = report.write(outcome, arguments.out)
    except OSError as error:
        raise _unwritable(arguments.out, error) from None
    print(*report.table(outcome), "", outcome.verdict, sep="\n")
    print(f"Reports: {', '.join(map(str, written))}")
    return ExitCode.OK if outcome.passed else ExitCode.ERROR


def _unwritable(out: Path, error: OSError) -> ApagentError:
    return ApagentError(f"{out}: can't write the reports ({error.strerror}); choose another --out")


def _progress() -> Callable[[str], None]:
    began = time.monotonic()

    def show(text: str) -> None:
        print(f"demo: {time.monotonic() - began:5.1f} s  {text}", file=sys.stderr, flush=True)

    return show
