"""Verbs about this AP as an anchor: drain, undrain, reclaim."""

from __future__ import annotations

import argparse
import sys
import time

from apagent.cli.agent_client import agent
from apagent.cli.exit_codes import ExitCode
from apagent.cli.render import Column, print_list
from apagent.v1 import control_pb2 as pb
from apagent.v1 import control_pb2_grpc

POLL_S = 0.5

ANCHOR_COLUMNS = (
    Column("NETWORK", lambda anchor: anchor.network),
    Column("MODE", lambda anchor: anchor.mode),
    Column("FLOWS", lambda anchor: anchor.flows),
    Column("NEW FLOWS AT", lambda anchor: anchor.deputy or "here"),
    Column("HOLDS", lambda anchor: " ".join(anchor.holds)),
)


def drain(args: argparse.Namespace) -> int:
    """Anchor nothing any more; with --wait until no flow is left."""
    deadline = time.monotonic() + args.timeout
    with agent(args.socket, args.timeout) as stub:
        request = pb.SetDrainRequest(drain=True, ap=args.ap)
        status: pb.Status = stub.SetDrain(request, timeout=args.timeout)
        if args.wait:
            status = _wait(stub, status, deadline)
    print_list(status.anchors, ANCHOR_COLUMNS, args.output)
    return ExitCode.UNFINISHED if args.wait and _left(status) else ExitCode.OK


def undrain(args: argparse.Namespace) -> int:
    """Anchor new flows again."""
    with agent(args.socket, args.timeout) as stub:
        request = pb.SetDrainRequest(drain=False, ap=args.ap)
        status: pb.Status = stub.SetDrain(request, timeout=args.timeout)
    print_list(status.anchors, ANCHOR_COLUMNS, args.output)
    return ExitCode.OK


def reclaim(args: argparse.Namespace) -> int:
    """Get our own NAT addresses back."""
    with agent(args.socket, args.timeout) as stub:
        status: pb.Status = stub.Reclaim(pb.ReclaimRequest(), timeout=args.timeout)
    print_list(status.anchors, ANCHOR_COLUMNS, args.output)
    return ExitCode.OK


def _left(status: pb.Status) -> int:
    return sum(anchor.flows for anchor in status.anchors)


def _wait(stub: control_pb2_grpc.ControlStub, status: pb.Status, deadline: float) -> pb.Status:
    """Poll until no flow is left or the time is over, and say on stderr how many are."""
    said = -1
    while (left := _left(status)) and time.monotonic() < deadline:
        if left != said:
            said = left
            print(f"{left} flows left", file=sys.stderr, flush=True)
        time.sleep(min(POLL_S, max(0.0, deadline - time.monotonic())))
        status = stub.GetStatus(pb.GetStatusRequest(), timeout=POLL_S * 20)
    return status
