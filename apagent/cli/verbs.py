"""What each verb of apctl does: one call to the agent, its answer printed, an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from apagent import __version__
from apagent.cli.agent_client import CallFailed, agent
from apagent.cli.columns import (
    CLIENT_COLUMNS,
    FLOW_COLUMNS,
    PEER_COLUMNS,
    ROAM_COLUMNS,
    client_rows,
    status_rows,
)
from apagent.cli.exit_codes import ExitCode
from apagent.cli.render import (
    Column,
    Output,
    clock_time,
    plain,
    print_json,
    print_line,
    print_list,
    print_object,
    print_table,
)
from apagent.v1 import control_pb2 as pb


def status(args: argparse.Namespace) -> int:
    """Print how the agent is; DEGRADED unless all is well."""
    with agent(args.socket, args.timeout) as stub:
        answer: pb.Status = stub.GetStatus(pb.GetStatusRequest(), timeout=args.timeout)
    print_object(answer, status_rows(answer), args.output)
    return ExitCode.DEGRADED if answer.degraded or not answer.in_sync else ExitCode.OK


def peers(args: argparse.Namespace) -> int:
    """Print the peers."""
    with agent(args.socket, args.timeout) as stub:
        answer: pb.ListPeersResponse = stub.ListPeers(pb.ListPeersRequest(), timeout=args.timeout)
    print_list(answer.peers, PEER_COLUMNS, args.output)
    return ExitCode.OK


def clients(args: argparse.Namespace) -> int:
    """Print the clients."""
    with agent(args.socket, args.timeout) as stub:
        answer: pb.ListClientsResponse = stub.ListClients(
            pb.ListClientsRequest(), timeout=args.timeout
        )
    print_list(answer.clients, CLIENT_COLUMNS, args.output)
    return ExitCode.OK


def flows(args: argparse.Namespace) -> int:
    """Print the sessions that match, as they come."""
    request = pb.ListFlowsRequest(client=args.client, anchor=args.anchor, protocol=args.protocol)
    with agent(args.socket, args.timeout) as stub:
        parts: Iterator[pb.FlowList] = stub.ListFlows(request, timeout=args.timeout)
        print_list((flow for part in parts for flow in part.flows), FLOW_COLUMNS, args.output)
    return ExitCode.OK


def client_show(args: argparse.Namespace) -> int:
    """Print one client with its roams."""
    request = pb.GetClientRequest(client=args.client)
    with agent(args.socket, args.timeout) as stub:
        answer: pb.Client = stub.GetClient(request, timeout=args.timeout)
    _print_client(answer, args.output)
    return ExitCode.OK


def client_associate(args: argparse.Namespace) -> int:
    """Tell the agent that a client is here, and print what it makes of it."""
    request = pb.AssociateRequest(mac=args.mac, address=args.address, network=args.network)
    with agent(args.socket, args.timeout) as stub:
        answer: pb.Client = stub.Associate(request, timeout=args.timeout)
    _print_client(answer, args.output)
    return ExitCode.OK


def watch(args: argparse.Namespace) -> int:
    """Print events as they happen, until interrupted."""
    with agent(args.socket, args.timeout) as stub:
        # A watch may be silent for hours: find out first whether the agent answers at all.
        stub.GetStatus(pb.GetStatusRequest(), timeout=args.timeout)
        events = stub.Watch(pb.WatchEventsRequest(flows=args.flows))
        try:
            for event in events:
                _print_event(event, args.output)
        except KeyboardInterrupt:
            return ExitCode.OK
        finally:
            events.cancel()
    raise CallFailed("the agent ended the watch", ExitCode.UNREACHABLE)


def version(args: argparse.Namespace) -> int:
    """Print our version, and the agent's where it answers."""
    answer = _agent_version(args)
    if args.output is Output.TABLE:
        print_table(
            [("apctl", __version__), ("agent", answer or "not reachable")],
            (Column("PROGRAM", lambda row: row[0]), Column("VERSION", lambda row: row[1])),
        )
    else:
        print_json({"apctl": __version__, "agent": answer}, args.output)
    return ExitCode.OK


def _agent_version(args: argparse.Namespace) -> str | None:
    try:
        with agent(args.socket, args.timeout) as stub:
            answer: pb.Status = stub.GetStatus(pb.GetStatusRequest(), timeout=args.timeout)
    except CallFailed:
        return None
    return answer.version


def _print_client(client: pb.Client, output: Output) -> None:
    print_object(client, client_rows(client), output)
    if output is Output.TABLE and client.roams:
        print_table(client.roams, ROAM_COLUMNS)


def _print_event(event: pb.AgentEvent, output: Output) -> None:
    if output is Output.TABLE:
        print_line(f"{clock_time(event.time)}  {event.kind:<11}  {event.text}")
    else:
        print_json(plain(event), Output.JSONL)
    sys.stdout.flush()
