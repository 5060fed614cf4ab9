"""Our nftables table: made, adopted, filled, read back and removed.

The table belongs to the socket that made or adopted it, where the kernel has owned tables that
persist (6.9): nobody else can change it while that socket is open, and it stays when the socket
closes, free to be adopted by the next one. So every change goes through one socket that lives as
long as the agent. (While no agent runs, the table is open to a foreign `nft flush ruleset`.)
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import IPv4Address
from itertools import chain
from typing import TypeVar

from apagent.core.domain import Domain, Network
from apagent.core.model import ICMP, PROTOCOL_OFFSET, ApId, NetworkName, SocketKey
from apagent.errors import KernelFault
from apagent.kernel.nft import messages
from apagent.kernel.nft.diversion import diversion, read_diverted, waiting
from apagent.kernel.nft.elements import (
    CLIENT_SIZE,
    ECHO_SIZE,
    FLOW_SIZE,
    SOCKET_SIZE,
    TARGET_SIZE,
    UPLINK_SIZE,
    ElementChange,
    ElementChanges,
    pack_client,
    pack_data,
    pack_echo,
    pack_flows,
    pack_place,
    pack_socket,
    pack_target,
    parse_elements,
    renewal,
    transactions,
    unpack_client,
    unpack_echo,
    unpack_flow,
    unpack_place,
    unpack_socket,
    unpack_target,
)
from apagent.kernel.nft.expressions import interface_name
from apagent.kernel.nft.forwarding import LEAKED, RESET
from apagent.kernel.nft.installed import (
    Installed,
    listing,
    read_counters,
    read_flowtables,
    read_installed,
    read_set_size,
    read_table,
)
from apagent.kernel.nft.migration import anchor_numbers, forwards_in_rules, moves
from apagent.kernel.nft.plan import plan
from apagent.kernel.nft.ruleset import Ruleset
from apagent.kernel.nft.sets import (
    LEFT,
    SETTLED,
    UNSYNCED,
    Names,
    anchor_number,
    anchor_value,
)
from apagent.kernel.port import Change, Counters, NetworkDelta, NetworkState
from apagent.kernel.wire import Message, Netlink

K = TypeVar("K")
V = TypeVar("V")

_NETLINK_NETFILTER = 12
_UNKNOWN_FLAGS = frozenset({errno.EOPNOTSUPP, errno.EINVAL})
"""What a kernel without owned, persistent tables answers (6.8 and before)."""
_NO_ROOM = {
    errno.ENFILE: "a map or set is full, which somebody else has made with a size: "
    "stop the agent, `apagent cleanup`, and start it again",
    errno.ENOMEM: "the kernel has no memory left for it",
}
_TOO_LARGE = frozenset({errno.EMSGSIZE, errno.ENOBUFS})
_READINGS = 20
"""How often a set is read until the reading is whole."""


class NftTable:
    """The nftables part of the data path, in the current network namespace."""

    def __init__(self) -> None:
        self._netlink = Netlink(_NETLINK_NETFILTER)
        self._table = ""
        self._ruleset: Ruleset | None = None
        self.is_owned = False
        """Whether the kernel keeps others from changing the table; known since `prepare`."""

    @property
    def port(self) -> int:
        """The port id of the socket that makes all changes."""
        return self._netlink.port

    def anchor_numbers(self, table: str) -> dict[ApId, int]:
        """The anchors' numbers that an earlier run left in `table`; empty: no table.

        Raises KernelFault.
        """
        installed = read_installed(self._netlink, table)
        return {} if installed is None else anchor_numbers(installed)

    def prepare(self, domain: Domain) -> tuple[list[str], bool]:
        """Own the table, and make its static part what `domain` says in one transaction.

        Session maps keep their elements, also those that lead to an anchor that is no peer any
        more: `read` shows them. What a map of another layout holds is carried over. A table made
        anew holds back what could belong to a peer's flow (`release_hold`). Returns what was
        changed, and whether it is anew. Raises KernelFault.
        """
        changed: list[str] = []
        with self._netlink.noting(changed):
            self._own(domain.table)
            installed = read_installed(self._netlink, domain.table)
            # An empty table was made a moment ago, or by an agent that died before it was filled.
            fresh = installed is None or not installed.chains
            changes = plan(self._ruleset_of(domain), installed) if installed else []
            carried = self._carried(domain, installed) if installed else []
            if fresh:
                changes += self._hold(domain)
            if changes:
                self._change_over(domain.table, changes, carried)
        self._table = domain.table
        return changed, fresh

    def read(self, domain: Domain, *, session_maps: bool = True) -> dict[NetworkName, NetworkState]:
        """The elements of the maps and sets; what is not in the table stays empty.

        An anchor whose number no peer has is read as an `ApId` that no AP can have, `#` and the
        number, so that the difference to what should be removes the element. Without
        `session_maps` flows and sockets stay empty, too. Raises KernelFault.
        """
        anchors = _Anchors((anchor_value(ap.number), ap.id) for ap in (domain.me, *domain.peers))
        states = {
            network.name: self._read_network(
                domain, Names.of(network.name), anchors if session_maps else None
            )
            for network in domain.networks
        }
        for network in domain.networks:
            state, names = states[network.name], Names.of(network.name)
            state.diverted = read_diverted(self._netlink, domain, names)
            if network.takeover:
                sources = self._elements(domain.table, names.sources, UPLINK_SIZE)
                state.sources = {
                    key.rstrip(b"\0").decode(): IPv4Address(value) for key, value in sources.items()
                }
            if network.lets_forwards_move:
                state.forwards = self._read_forwards(domain.table, names)
        return states

    def apply(self, domain: Domain, deltas: Mapping[NetworkName, NetworkDelta]) -> None:
        """Install the changes of places, flows, sockets, sources, forwards and diverted anchors.

        All networks' changes go together, in one transaction unless they are thousands. Anchors are
        diverted before that, or after it if they have to wait (`diversion.waiting`). Raises
        KernelFault: ENOENT or EEXIST mean that an element wasn't as the change believed.
        """
        later = {network: waiting(delta) for network, delta in deltas.items()}
        self._divert(domain, deltas, lambda network, anchor: anchor not in later[network])
        aps = (domain.me, *domain.peers)
        data = {ap.id: pack_data(anchor_value(ap.number)) for ap in aps}
        places = (
            change
            for name, delta in deltas.items()
            for change in _places(domain.network_by_name[name], delta)
        )
        sessions = (
            change
            for name, delta in deltas.items()
            for change in session_changes(Names.of(name), delta, data)
        )
        begun = _begun(domain, deltas)
        for batch in transactions(domain.table, chain(places, sessions)):
            self._transact(domain.table, [*begun, *batch])
            begun = []
        self._divert(domain, deltas, lambda network, anchor: anchor in later[network])

    def counters(self) -> Counters:
        """What leak guard and reset rule have counted, over all networks. Raises KernelFault."""
        if not self._table:
            raise KernelFault("no nftables table is prepared that could count")
        counted = read_counters(self._netlink, self._table)
        return Counters(leaked=counted.get(LEAKED, 0), reset=counted.get(RESET, 0))

    def flowtables(self) -> list[str]:
        """Everybody's flowtables, "table/flowtable" each. Raises KernelFault."""
        return read_flowtables(self._netlink)

    def remove(self, domain: Domain) -> list[str]:
        """Remove the table; returns what was removed. Raises KernelFault."""
        if read_table(self._netlink, domain.table) is None:
            return []
        self._transact(domain.table, [messages.delete_table(domain.table)])
        return [f"nftables table inet {domain.table}"]

    def close(self) -> None:
        """Close the socket; the table stays."""
        self._netlink.close()

    def release_hold(self, domain: Domain) -> None:
        """Stop holding back; no error if the kernel's timer was first. Raises KernelFault."""
        for network in domain.networks:
            key = interface_name(network.client_interface)
            self._change_alone(ElementChange(UNSYNCED, key, deleted=True, data=None), errno.ENOENT)

    def _divert(
        self,
        domain: Domain,
        deltas: Mapping[NetworkName, NetworkDelta],
        is_due: Callable[[NetworkName, ApId], bool],
    ) -> None:
        changes = [
            message
            for network, delta in deltas.items()
            for message in diversion(
                domain,
                Names.of(network),
                {anchor: c for anchor, c in delta.diverted.items() if is_due(network, anchor)},
            )
        ]
        if changes:
            self._transact(domain.table, changes)

    def _change_alone(self, change: ElementChange, harmless: int) -> None:
        for batch in transactions(self._table, [change]):
            try:
                self._transact(self._table, batch)
            except KernelFault as fault:
                if fault.errno != harmless:
                    raise

    def _hold(self, domain: Domain) -> list[Message]:
        keys = (interface_name(network.client_interface) for network in domain.networks)
        changes = [ElementChange(UNSYNCED, key, deleted=False, data=b"") for key in keys]
        return [message for batch in transactions(domain.table, changes) for message in batch]

    def _carried(self, domain: Domain, installed: Installed) -> list[list[Message]]:
        """What sets that are made anew are to hold at once, in parts that fit a transaction."""
        wanted = self._ruleset_of(domain).sets
        changes = [
            change
            for move in moves(domain, installed.sets, wanted)
            for change in move.changes(
                self._elements(
                    domain.table,
                    move.source.name,
                    move.source.key_length,
                    move.source.data_length,
                )
            )
        ]
        changes += forwards_in_rules(domain, installed)
        return list(transactions(domain.table, changes))

    def _change_over(
        self, table: str, changes: Sequence[Message], carried: Sequence[Sequence[Message]]
    ) -> None:
        """From one layout to another in one transaction.

        Where the kernel grants no socket buffer for that, what is carried over follows at once.
        """
        try:
            self._transact(table, [*changes, *chain.from_iterable(carried)])
        except KernelFault as fault:
            if not carried or fault.errno not in _TOO_LARGE:
                raise
            for batch in (changes, *carried):
                self._transact(table, batch)

    def _ruleset_of(self, domain: Domain) -> Ruleset:
        """Kept: to pack it takes longer than to compare it."""
        if self._ruleset is None or self._ruleset.domain is not domain:
            self._ruleset = Ruleset(domain)
        return self._ruleset

    def _own(self, table: str) -> None:
        """Make the table or adopt it.

        The kernel refuses changes of base chains in the transaction that adopts a table, so this
        is one of its own.
        """
        installed = read_table(self._netlink, table)
        if installed is not None:
            # Nothing else stays: a table that somebody made dormant forwards nothing for us.
            flags = installed.flags & messages.PERSIST and messages.OWNED
            owner = self._netlink.port if flags else None
            if (installed.flags, installed.owner) != (flags, owner):
                self._transact(table, [messages.new_table(table, flags)])
            self.is_owned = bool(flags)
            return
        self.is_owned = True
        try:
            self._transact(table, [messages.new_table(table, messages.OWNED)])
        except KernelFault as fault:
            if fault.errno not in _UNKNOWN_FLAGS:
                raise
            self.is_owned = False
            self._transact(table, [messages.new_table(table, 0)])

    def _transact(self, table: str, batch: Sequence[Message]) -> None:
        try:
            self._netlink.transaction(messages.BEGIN, batch, messages.END)
        except KernelFault as fault:
            if fault.errno in _NO_ROOM:
                raise KernelFault(f"{fault}: {_NO_ROOM[fault.errno]}", fault.errno) from fault
            owner = self._owner(table) if fault.errno == errno.EPERM else None
            if owner is None:
                raise
            raise KernelFault(
                f"nftables table inet {table} belongs to a running process (netlink port {owner},"
                " usually its process id): an agent runs here already; stop it first, or give"
                " this one a table of its own (kernel.table)",
                errno.EPERM,
            ) from fault

    def _owner(self, table: str) -> int | None:
        installed = read_table(self._netlink, table)
        return installed.owner if installed else None

    def _read_network(self, domain: Domain, names: Names, anchors: _Anchors | None) -> NetworkState:
        aps = {peer.tunnel_mac: peer.id for peer in domain.peers}
        known, home, elsewhere, places = (
            self._elements(domain.table, pairs, CLIENT_SIZE)
            for pairs in (names.known, names.home, names.elsewhere, names.places)
        )
        state = NetworkState(
            known=dict(map(unpack_client, known)),
            home=dict(map(unpack_client, home)),
            elsewhere=dict(map(unpack_client, elsewhere)),
            places=dict(unpack_place(key, aps) for key in places),
        )
        if anchors is not None:
            self._read_session_maps(domain.table, names, anchors, state)
        return state

    def _read_forwards(self, table: str, names: Names) -> dict[SocketKey, SocketKey]:
        elements = self._elements(table, names.forwards, SOCKET_SIZE, TARGET_SIZE)
        return {
            (outside := unpack_socket(key)): unpack_target(value, outside)
            for key, value in elements.items()
        }

    def _read_session_maps(
        self, table: str, names: Names, anchors: _Anchors, state: NetworkState
    ) -> None:
        flows = self._elements(table, names.flows, FLOW_SIZE)
        echoes = self._elements(table, names.echoes, ECHO_SIZE)
        sockets = self._elements(table, names.sockets, SOCKET_SIZE)
        state.flows = {
            **{unpack_flow(key): anchors[value] for key, value in flows.items()},
            **{unpack_echo(key): anchors[value] for key, value in echoes.items()},
        }
        state.sockets = {unpack_socket(key): anchors[value] for key, value in sockets.items()}

    def _elements(
        self, table: str, set_: str, key_size: int, value_size: int = 4
    ) -> dict[bytes, bytes]:
        """All elements of a set, key and value as the kernel has them.

        A dump of more than one message leaves elements out while the kernel resizes the hash table
        under it, as it does for some time after many changes. So a reading counts if its size is
        what the kernel says (Linux 6.17) or what the reading before had.
        """
        expected: int | None = None
        for _ in range(_READINGS):
            bodies = listing(self._netlink, messages.list_elements(table, set_))
            elements = {
                key: value
                for body in bodies
                for key, value in parse_elements(body, key_size, value_size)
            }
            size = read_set_size(self._netlink, table, set_)
            if len(bodies) <= 1 or len(elements) == (expected if size is None else size):
                return elements
            expected = len(elements)
        raise KernelFault(f"inet {table} {set_} kept changing while it was read", errno.EAGAIN)


class _Anchors(dict[bytes, ApId]):
    """Anchor's value in the maps -> anchor; of an unknown one `#` and its number."""

    def __missing__(self, value: bytes) -> ApId:
        number = anchor_number(value)
        return ApId(f"#{value.hex()}" if number is None else f"#{number}")


def _places(network: Network, delta: NetworkDelta) -> Iterator[ElementChange]:
    """The clients' pairs; what the kernel had learned of a client that has moved is void.

    They come before the sessions, so that those of a client that is at home no more are looked up
    from the first one on.
    """
    names = Names.of(network.name)
    for set_, pairs in (
        (names.home, delta.home),
        (names.known, delta.known),
        (names.elsewhere, delta.elsewhere),
    ):
        yield from _moved(set_, pairs, pack_client)
    yield from _moved(names.places, delta.places, pack_place)
    if not network.zone:
        for address in delta.known.keys() | delta.elsewhere.keys() | delta.places.keys():
            yield ElementChange(SETTLED, address.packed, deleted=False, data=b"")


def _moved(
    set_: str, changes: Mapping[IPv4Address, Change[V]], pack: Callable[[IPv4Address, V], bytes]
) -> Iterator[ElementChange]:
    """Elements of which a change concerns the key: one goes, another comes."""
    for address, change in changes.items():
        if change.old is not None:
            yield ElementChange(set_, pack(address, change.old), deleted=True, data=None)
        if change.new is not None:
            yield ElementChange(set_, pack(address, change.new), deleted=False, data=b"")


def _begun(domain: Domain, deltas: Mapping[NetworkName, NetworkDelta]) -> list[Message]:
    """Requests that begin the time of those who have just arrived, or left."""
    messages: list[Message] = []
    left: list[bytes] = []
    for name, delta in deltas.items():
        arrived = [address.packed for address, client in delta.known.items() if client.new]
        messages += renewal(domain.table, Names.of(name).arrived, arrived)
        if not domain.network_by_name[name].zone:
            left += [a.packed for a, client in delta.known.items() if not client.new]
    return [*messages, *renewal(domain.table, LEFT, left)]


def session_changes(
    names: Names, delta: NetworkDelta, data: Mapping[ApId, bytes]
) -> Iterator[ElementChange | ElementChanges]:
    """Elements of the maps of flows, echoes and sockets, of sources and forwards."""
    for (old, new), keys in _by_change(delta.flows).items():
        after = None if new is None else data[new]
        echoes = [pack_echo(key) for key in keys if key[PROTOCOL_OFFSET] == ICMP]
        flows = [key for key in keys if key[PROTOCOL_OFFSET] != ICMP] if echoes else keys
        yield ElementChanges(names.echoes, echoes, old is not None, after)
        yield ElementChanges(names.flows, pack_flows(flows), old is not None, after)
    for (old, new), sockets in _by_change(delta.sockets).items():
        after = None if new is None else data[new]
        packed = [pack_socket(socket) for socket in sockets]
        yield ElementChanges(names.sockets, packed, old is not None, after)
    for uplink, source in delta.sources.items():
        after = None if source.new is None else pack_data(source.new.packed)
        yield ElementChange(names.sources, interface_name(uplink), source.old is not None, after)
    for outside, inside in delta.forwards.items():
        after = None if inside.new is None else pack_data(pack_target(inside.new))
        yield ElementChange(names.forwards, pack_socket(outside), inside.old is not None, after)


def _by_change(changes: Mapping[K, Change[ApId]]) -> dict[Change[ApId], list[K]]:
    """The keys of each kind of change: many flows, few anchors."""
    keys: dict[Change[ApId], list[K]] = {}
    for key, change in changes.items():
        keys.setdefault(change, []).append(key)
    return keys
