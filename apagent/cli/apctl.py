"""The `apctl` command: ask a running agent, and tell it a few things."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias, TypeVar

from apagent.cli import drain_verbs, verbs
from apagent.cli.agent_client import CallFailed
from apagent.cli.exit_codes import ExitCode
from apagent.cli.render import Output
from apagent.config import DEFAULT_SOCKET
from apagent.control.notation import parse_address, parse_client, parse_mac
from apagent.core.model import PROTOCOL_NUMBERS

SOCKET_VARIABLE = "APAGENT_SOCKET"
DEFAULT_TIMEOUT_S = 10.0
MAX_TIMEOUT_S = 1e6
"""Eleven days; a socket's timeout has a limit."""

_EXIT_CODES = """exit codes:
  0 ok, 1 error, 2 usage, 3 agent unreachable, 4 agent degraded or not in sync (status),
  5 not found, 6 not finished in time (drain --wait; it goes on), 130 interrupted
"""
_EXAMPLES = """examples:
  apctl status
  apctl flows --client 10.77.0.5 -o json
  apctl client show aa:bb:cc:dd:ee:ff
  apctl watch
"""

_T = TypeVar("_T")
_Verb = Callable[[argparse.Namespace], int]
_Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001 - it has no public name


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    _open_what_is_closed()
    args = _parse(sys.argv[1:] if argv is None else argv)
    try:
        code: int = args.verb(args)
        sys.stdout.flush()
    except CallFailed as failure:
        sys.stderr.write(f"apctl: {failure}\n")
        return failure.exit_code
    except BrokenPipeError:
        # Whoever read our output (`head`) has enough. Python would complain at its exit.
        _drop_output()
        return ExitCode.OK
    except OSError as error:  # calls fail otherwise
        sys.stderr.write(f"apctl: the output can't be written: {error.strerror}\n")
        _drop_output()
        return ExitCode.ERROR
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    return code


def _open_what_is_closed() -> None:
    """Streams that our caller has closed (`>&-`): what a verb does is no less done."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            nowhere = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - until we exit
            setattr(sys, name, nowhere)


def _drop_output() -> None:
    """Have what is still to be written go nowhere, also at our exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    for argument in argv:
        try:
            argument.encode()
        except UnicodeEncodeError:
            parser.error(f"{argument!r} is not UTF-8 text")
    return parser.parse_args(argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="apctl",
        description="Ask the apagent on this AP, and tell it a few things.",
        epilog=_EXAMPLES + "\n" + _EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[_common(for_verb=False)],
    )
    verbs_ = parser.add_subparsers(required=True, metavar="VERB")
    _add_reads(verbs_)
    _add_client(verbs_)
    _add_anchor(verbs_)
    return parser


def _common(*, for_verb: bool) -> argparse.ArgumentParser:
    """The options that stand before or after the verb.

    A verb's own have no default, so that they don't undo what stood before it.
    """

    def default(value: object) -> object:
        return argparse.SUPPRESS if for_verb else value

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--socket",
        type=Path,
        metavar="PATH",
        default=default(Path(os.environ.get(SOCKET_VARIABLE) or DEFAULT_SOCKET)),
        help=f"the agent's socket (default: ${SOCKET_VARIABLE}, or {DEFAULT_SOCKET})",
    )
    common.add_argument(
        "-o",
        "--output",
        type=_argument(Output, f"one of {', '.join(Output)}"),
        metavar="{" + ",".join(Output) + "}",
        default=default(Output.TABLE),
        help="how to print (default: table)",
    )
    common.add_argument(
        "--timeout",
        type=_argument(_seconds, f"a number of seconds above 0, up to {MAX_TIMEOUT_S:.0f}"),
        metavar="SECONDS",
        default=default(DEFAULT_TIMEOUT_S),
        help=f"how long the whole answer may take (default: {DEFAULT_TIMEOUT_S:g})",
    )
    return common


def _add_reads(verbs_: _Verbs) -> None:
    _add(verbs_, "status", verbs.status, "how the agent is", "apctl status -o json")
    _add(verbs_, "peers", verbs.peers, "the peers, and how their feeds go", "apctl peers")
    _add(
        verbs_, "clients", verbs.clients, "the clients of the roam domain", "apctl clients -o jsonl"
    )
    flows = _add(
        verbs_,
        "flows",
        verbs.flows,
        "the uplink sessions of every AP",
        "apctl flows --client 02:00:5e:10:00:01 --protocol tcp",
        "apctl flows --anchor ap2 -o jsonl",
    )
    flows.add_argument("--client", type=_client, metavar="MAC|ADDRESS")
    flows.add_argument("--anchor", metavar="AP", help="only those that AP translates")
    flows.add_argument(
        "--protocol",
        type=str.lower,
        choices=list(PROTOCOL_NUMBERS),
        metavar="PROTOCOL",
        help=", ".join(PROTOCOL_NUMBERS),
    )
    watch = _add(
        verbs_,
        "watch",
        verbs.watch,
        "live events until interrupted",
        "apctl watch --flows",
        "apctl watch -o jsonl | jq .fields",
    )
    watch.description = (
        "Live events until interrupted: clients that come, roam and leave, and how many of their\n"
        "flows go on; peers, and APs as anchors. -o json prints a line each, like jsonl."
    )
    watch.add_argument(
        "--flows",
        action="store_true",
        help="also what becomes of each flow, at whatever AP: opened, established (in networks "
        "with takeover), closed. A flow that moves is opened or established at the AP that goes "
        "on with it, and closed where it was. Not told: what a peer's snapshot brings",
    )
    _add(verbs_, "version", verbs.version, "versions of apctl and of the agent", "apctl version")


def _add_client(verbs_: _Verbs) -> None:
    client = verbs_.add_parser("client", help="one client: show, associate")
    actions = client.add_subparsers(required=True, metavar="ACTION")
    show = _add(
        actions,
        "show",
        verbs.client_show,
        "one client, with its latest roams",
        "apctl client show 10.77.0.5",
        "apctl client show aabb.ccdd.eeff -o json",
    )
    show.add_argument("client", type=_client, metavar="MAC|ADDRESS")
    associate = _add(
        actions,
        "associate",
        verbs.client_associate,
        "tell the agent that a client is associated here now",
        "apctl client associate aa-bb-cc-dd-ee-ff --address 10.77.0.5",
    )
    associate.add_argument("mac", type=_argument(parse_mac), metavar="MAC")
    associate.add_argument("--address", type=_address, help="its IPv4 address, if known")
    associate.add_argument("--network", help="needed where the agent has several")


def _add_anchor(verbs_: _Verbs) -> None:
    drain = _add(
        verbs_,
        "drain",
        drain_verbs.drain,
        "move this AP's flows to others before it goes down, and anchor no new ones",
        "apctl drain",
        "apctl drain ap1 --wait --timeout 600 && reboot",
    )
    drain.add_argument("ap", nargs="?", default="", metavar="AP", help="this AP, to be sure")
    drain.add_argument(
        "--wait",
        action="store_true",
        help="until no flow is left, or for --timeout (then the exit code is 6)",
    )
    undrain = _add(
        verbs_, "undrain", drain_verbs.undrain, "anchor new flows here again", "apctl undrain"
    )
    undrain.add_argument("ap", nargs="?", default="", metavar="AP", help="this AP, to be sure")
    _add(
        verbs_,
        "reclaim",
        drain_verbs.reclaim,
        "get this AP's NAT addresses back, with their flows, from whoever took them over",
        "apctl reclaim",
    )


def _add(
    verbs_: _Verbs, name: str, verb: _Verb, text: str, *examples: str
) -> argparse.ArgumentParser:
    parser = verbs_.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog="\n".join(["examples:", *(f"  {example}" for example in examples)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[_common(for_verb=True)],
    )
    parser.set_defaults(verb=verb)
    return parser


def _argument(parse: Callable[[str], _T], expected: str = "") -> Callable[[str], _T]:
    """`parse` for argparse, which prints the text of no other error."""

    def parse_argument(text: str) -> _T:
        try:
            return parse(text)
        except ValueError as error:
            says = f"{text!r} is not {expected}" if expected else str(error)
            raise argparse.ArgumentTypeError(says) from None

    return parse_argument


def _client(text: str) -> str:
    return str(_argument(parse_client)(text))


def _address(text: str) -> str:
    return str(_argument(parse_address)(text))


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds <= MAX_TIMEOUT_S:
        raise ValueError(text)
    return seconds
