"""What of a lab is there now: namespaces, agents, associations. The keys are stable."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TypedDict

from apagent.errors import ApagentError
from apagent.lab import namespaces
from apagent.lab.lab import Lab
from apagent.lab.plan import FABRIC


class AgentStatus(TypedDict):
    """An AP's agent; `in_sync` is null where it doesn't answer."""

    pid: int | None
    alive: bool
    in_sync: bool | None


class NodeStatus(TypedDict):
    """A node; `present` says whether its namespace is there, `agent` is null where none belongs."""

    node: str
    kind: str
    namespace: str
    present: bool
    agent: AgentStatus | None


class ClientStatus(TypedDict):
    """A client, and the AP that it is associated with."""

    client: str
    ap: str | None
    address: str
    mac: str


class LabStatus(TypedDict):
    """A whole lab; `state` is `up`, `building` (or interrupted then) or `degraded`."""

    state: str
    prefix: str
    root: str
    agents: bool
    nodes: list[NodeStatus]
    clients: list[ClientStatus]


def inspect(lab: Lab) -> LabStatus:
    """Look at everything; agents are asked at the same time."""
    present = set(namespaces.names())
    with ThreadPoolExecutor(max_workers=8) as pool:
        agents = dict(zip(lab.aps, pool.map(lambda ap: _agent(lab, ap), lab.aps), strict=True))
    nodes = [
        NodeStatus(
            node=node.name,
            kind=node.kind,
            namespace=lab.namespace(node.name),
            present=lab.namespace(node.name) in present,
            agent=agents.get(node.name),
        )
        for node in lab.plan.nodes
    ]
    return LabStatus(
        state=_state(lab, nodes),
        prefix=lab.place.prefix,
        root=str(lab.place.root),
        agents=lab.has_agents,
        nodes=nodes,
        clients=_clients(lab, fabric=lab.namespace(FABRIC) in present),
    )


def _state(lab: Lab, nodes: list[NodeStatus]) -> str:
    if lab.phase != "up":
        return lab.phase
    whole = all(node["present"] for node in nodes)
    agents = [node["agent"] for node in nodes if node["agent"] is not None]
    return "up" if whole and all(agent["in_sync"] for agent in agents) else "degraded"


def _agent(lab: Lab, ap: str) -> AgentStatus | None:
    if not lab.has_agents:
        return None
    process = lab.agents.process(ap)
    if process is None:
        return AgentStatus(pid=None, alive=False, in_sync=None)
    try:
        in_sync = bool(lab.apctl(ap, "status")["in_sync"])
    except (ApagentError, ValueError, KeyError):
        return AgentStatus(pid=process.pid, alive=True, in_sync=None)
    return AgentStatus(pid=process.pid, alive=True, in_sync=in_sync)


def _clients(lab: Lab, *, fabric: bool) -> list[ClientStatus]:
    locations = lab.locations() if fabric else {}
    return [
        ClientStatus(
            client=client,
            ap=locations.get(client),
            address=str(lab.plan.station(client).address),
            mac=lab.plan.station(client).mac or "",
        )
        for client in lab.clients
    ]
