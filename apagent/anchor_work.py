"""What the anchors' part of the engine needs done: probes in rounds, ARP questions, adoptions.

The engine counts time in rounds; here they are made. A round first tells who has answered the one
before, and only then asks again, so that a loop that was late judges nobody by its own lateness.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice

from apagent.core.effects import (
    AdoptFlows,
    DefendAddress,
    Effect,
    LoosenFlows,
    PokeClients,
    ProbeAddress,
)
from apagent.core.events import (
    AddressConflict,
    AddressProbed,
    AdoptionFailed,
    Event,
    FlowsAdopted,
    ProbesAnswered,
)
from apagent.core.liveness import ROUND_S
from apagent.core.model import ApId, FlowKey, Mac, Nat, NatAddress, NetworkName
from apagent.errors import KernelFault
from apagent.kernel.port import AddressWatch, DataPath, FlowMonitor, TunnelProber, UplinkProber

log = logging.getLogger(__name__)

ARP_PROBES, ARP_INTERVAL_S = 3, 0.04
"""RFC 5227, section 2.1.1, asks three times within some seconds, since an address may be taken for
years and a switch port may still be blocked. Here connections wait, and the segment is in use."""
UNKNOWN_USER = Mac("00:00:00:00:00:00")
"""Stands for whoever may use an address that could not be asked for."""
POKE_AGAIN_S = 0.7
"""A frame may be lost on the air. Linux answers one such segment in half a second
(net.ipv4.tcp_invalid_ratelimit)."""
POKED_A_TURN, POKE_PAUSE_S = 128, 0.02
"""Flows whose clients are roused at once, and the pause before the next: small frames, but each
takes its time on the air."""
ADOPTED_A_TURN = 2048
"""Flows whose conntrack entries are made or changed in one turn of the loop, some milliseconds'
work."""

Later = Callable[[float, Callable[[], None]], object]


class AnchorWork:
    """Carries out what the engine wants of anchors, and tells it what has come of it."""

    def __init__(  # noqa: PLR0913 - one for each thing that it works with
        self,
        peers: Iterable[ApId],
        emit: Callable[[Event], None],
        later: Later,
        *,
        tunnel: TunnelProber,
        uplinks: UplinkProber,
        segment: AddressWatch,
        flows: FlowMonitor,
        kernel: DataPath,
        spared: Callable[[], Collection[ApId]] = tuple,
    ) -> None:
        """`spared` says on which peers nothing depends now: they are probed less often."""
        self._peers = tuple(peers)
        self._emit = emit
        self._later = later
        self._tunnel = tunnel
        self._uplinks = uplinks
        self._segment = segment
        self._flows = flows
        self._kernel = kernel
        self._spared = spared
        self._complaint = ""
        self._stopped = False
        self._stop_listening: Callable[[], object] = lambda: None
        self._asked: dict[NatAddress, Mac | None] = {}
        """Addresses that were asked for -> who has answered."""

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Listen to what is said about our addresses, and begin the rounds."""
        loop.add_reader(self._segment.fileno(), self._guarded, self.listen)
        self._stop_listening = partial(loop.remove_reader, self._segment.fileno())
        self.begin()

    def begin(self) -> None:
        """Begin the rounds."""
        self._probe()
        self._later(ROUND_S, self._round)

    def listen(self) -> None:
        """Take in what was heard on the uplinks' segments."""
        for nat, mac in self._segment.read():
            if nat in self._asked:
                self._asked[nat] = mac
            else:
                self._emit(AddressConflict(nat, mac))

    def carry_out(self, effect: Effect) -> None:
        """Do what the engine wants, if it concerns us."""
        match effect:
            case ProbeAddress(nat):
                self._ask(nat)
            case DefendAddress(nat):
                self._guarded(lambda: self._segment.announce(nat))
            case AdoptFlows(nat, sessions, forwarded):
                self._adopt(nat, dict(sessions), forwarded)
            case LoosenFlows(flows):
                self._loosen(iter(flows))
            case PokeClients(network, clients):
                self._poke(network, clients)
                self._later(POKE_AGAIN_S, partial(self._poke, network, clients))

    def close(self) -> None:
        """Stop, and close the sockets."""
        self._stopped = True
        self._stop_listening()
        self._tunnel.close()
        self._uplinks.close()
        self._segment.close()

    def _guarded(self, action: Callable[[], None]) -> None:
        """What the kernel refuses is asked for again by the next round; it is said once."""
        try:
            action()
        except KernelFault as fault:
            if str(fault) != self._complaint:
                self._complaint = str(fault)
                log.warning("%s", fault)

    # --- rounds

    def _round(self) -> None:
        if self._stopped:
            return
        self._later(ROUND_S, self._round)
        self._guarded(self._tell)
        self._probe()

    def _tell(self) -> None:
        self._emit(ProbesAnswered(self._tunnel.answered(), self._uplinks.answered()))

    def _probe(self) -> None:
        self._guarded(lambda: self._tunnel.probe(self._peers, self._spared()))
        self._guarded(self._uplinks.probe)

    # --- addresses

    def _ask(self, nat: NatAddress) -> None:
        self._asked[nat] = None
        for number in range(ARP_PROBES):
            self._later(number * ARP_INTERVAL_S, partial(self._ask_once, nat))
        self._later(ARP_PROBES * ARP_INTERVAL_S, partial(self._conclude, nat))

    def _ask_once(self, nat: NatAddress) -> None:
        try:
            if nat in self._asked and self._asked[nat] is None:
                self._segment.probe(nat)
        except KernelFault as fault:
            log.warning("asking who uses %s: %s", nat, fault)
            self._asked[nat] = UNKNOWN_USER

    def _conclude(self, nat: NatAddress) -> None:
        if nat in self._asked:
            self._segment.stop_probing(nat)
            self._emit(AddressProbed(nat, self._asked.pop(nat)))

    # --- flows

    def _loosen(self, rest: Iterator[FlowKey]) -> None:
        some = list(islice(rest, ADOPTED_A_TURN))
        if some and not self._stopped:
            self._guarded(lambda: self._flows.loosen(some))
            self._later(0.0, partial(self._loosen, rest))

    def _poke(self, network: NetworkName, clients: Mapping[Mac, Iterable[FlowKey]]) -> None:
        self._poke_some(network, ((mac, flow) for mac, flows in clients.items() for flow in flows))

    def _poke_some(self, network: NetworkName, rest: Iterator[tuple[Mac, FlowKey]]) -> None:
        some: dict[Mac, list[FlowKey]] = {}
        for mac, flow in islice(rest, POKED_A_TURN):
            some.setdefault(mac, []).append(flow)
        if some and not self._stopped:
            self._guarded(lambda: self._kernel.poke(network, some))
            self._later(POKE_PAUSE_S, partial(self._poke_some, network, rest))

    def _adopt(
        self, nat: NatAddress, sessions: Mapping[FlowKey, Nat], forwarded: Collection[FlowKey]
    ) -> None:
        log.info("continuing %d flows of %s", len(sessions), nat)
        rest = iter(sessions.items())
        self._adopt_some(nat, sessions, forwarded, rest, frozenset())

    def _adopt_some(
        self,
        nat: NatAddress,
        sessions: Mapping[FlowKey, Nat],
        forwarded: Collection[FlowKey],
        rest: Iterable[tuple[FlowKey, Nat]],
        left_out: frozenset[FlowKey],
    ) -> None:
        some = dict(islice(rest, ADOPTED_A_TURN))
        if not some:
            self._emit(FlowsAdopted(nat, sessions, left_out))
            return
        try:
            left_out |= frozenset(self._flows.adopt(NetworkName(nat.network), some, forwarded))
        except KernelFault as fault:
            self._emit(AdoptionFailed(nat, str(fault)))
            return
        self._later(0.0, partial(self._adopt_some, nat, sessions, forwarded, rest, left_out))
