"""How much is measured: everything, or a quick look at it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes of all measurements."""

    rounds: int
    """Of what is cheap to measure."""
    few: int
    """Rounds of what takes longer."""
    load_s: float
    """How long flows come at a rate."""
    burst: int
    """Flows that come as fast as they can."""
    most_flows: int
    """Room in a conntrack table (net.netfilter.nf_conntrack_max, less some)."""
    ramp: tuple[int, ...]
    """Rates that are tried, upwards."""
    ramp_s: float
    latency_s: float
    latency_rates: tuple[int, ...]
    latency_peers: tuple[int, ...]
    growth_peers: tuple[int, ...]
    growth_sessions: tuple[int, ...]
    growth_flows: int
    path_sessions: tuple[int, ...]
    turns: int
    """Turns of each side where two paths are compared."""
    turn_packets: int
    iperf_runs: int
    iperf_s: float
    roam_sessions: tuple[int, ...]
    roams: int
    roam_dwell_s: float
    many_sessions: int
    moved_flows: tuple[int, ...]
    """Flows of an anchor that dies or is drained."""
    idle_aps: int
    idle_clients: int
    idle_settle_s: float
    idle_s: float


FULL = Scale(
    rounds=3,
    few=2,
    load_s=6.0,
    burst=100_000,
    most_flows=200_000,
    ramp=(15_000, 20_000, 25_000, 30_000, 40_000, 50_000, 60_000),
    ramp_s=2.5,
    latency_s=4.0,
    latency_rates=(1_000, 10_000, 20_000),
    latency_peers=(1, 3, 8),
    growth_peers=(3, 10, 30, 100),
    growth_sessions=(1_000, 10_000, 100_000, 1_000_000),
    growth_flows=20_000,
    path_sessions=(1, 1_000_000),
    turns=20,
    turn_packets=30_000,
    iperf_runs=3,
    iperf_s=2.5,
    roam_sessions=(1, 1_000, 100_000),
    roams=50,
    roam_dwell_s=0.1,
    many_sessions=100_000,
    moved_flows=(1_000, 20_000, 100_000),
    idle_aps=21,
    idle_clients=200,
    idle_settle_s=10.0,
    idle_s=40.0,
)
QUICK = Scale(
    rounds=1,
    few=1,
    load_s=1.0,
    burst=30_000,
    most_flows=60_000,
    ramp=(20_000,),
    ramp_s=1.0,
    latency_s=1.0,
    latency_rates=(10_000,),
    latency_peers=(1,),
    growth_peers=(3,),
    growth_sessions=(1_000, 10_000),
    growth_flows=5_000,
    path_sessions=(1,),
    turns=6,
    turn_packets=20_000,
    iperf_runs=1,
    iperf_s=1.0,
    roam_sessions=(1_000,),
    roams=12,
    roam_dwell_s=0.1,
    many_sessions=10_000,
    moved_flows=(),
    idle_aps=3,
    idle_clients=5,
    idle_settle_s=1.0,
    idle_s=5.0,
)
