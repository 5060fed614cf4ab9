"""Who else uses our NAT addresses on the uplinks' segments: what ARP frames say (RFC 5227)."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable

from apagent.core.domain import Network
from apagent.core.model import Mac, NatAddress, NetworkName
from apagent.errors import KernelFault
from apagent.kernel.arp import ETH_P_ARP, SENDER, SENDER_MAC, TARGET, ArpAnnouncer
from apagent.kernel.packet_filter import DROP, KEEP, assemble, attach, equals, load_word

_SNAPLEN = 64
_FRAMES_A_READ = 1024
_NO_ADDRESS = bytes(4)


class LinuxAddressWatch:
    """An `AddressWatch` (apagent.kernel.port) in the current network namespace.

    One socket hears all interfaces: an uplink may go and come back. Its filter lets only frames
    about the networks' own NAT addresses through, which an earlier run may have taken, and about
    those that were asked for or announced. Raises KernelFault.
    """

    def __init__(self, networks: Iterable[Network]) -> None:
        homes = list(networks)
        self._uplinks = {network.name: network.uplink for network in homes}
        self._announcers: dict[str, ArpAnnouncer] = {}
        self._watched: dict[tuple[str, bytes], NatAddress] = {}
        """By uplink and packed address."""
        for network in homes:
            if (address := network.nat_address) is not None:
                key = network.uplink, address.packed
                self._watched[key] = NatAddress(network.name, address)
        self._asking: set[NatAddress] = set()
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        try:
            self._socket = socket.socket(socket.AF_PACKET, kind, socket.htons(ETH_P_ARP))
            self._watch_only()
        except OSError as error:
            raise KernelFault(f"listening to ARP: {error.strerror}", error.errno or 0) from None

    def fileno(self) -> int:
        """Readable when something was heard."""
        return self._socket.fileno()

    def probe(self, nat: NatAddress) -> None:
        """Ask who uses the address, without saying that we would. Raises KernelFault."""
        self._watch(nat)
        self._asking.add(nat)
        self._announcer(nat.network).ask(nat.address)

    def stop_probing(self, nat: NatAddress) -> None:
        """From now on another machine that asks, too, is no conflict."""
        self._asking.discard(nat)

    def announce(self, nat: NatAddress) -> None:
        """Say that we use it. Raises KernelFault."""
        self._watch(nat)
        self._asking.discard(nat)
        self._announcer(nat.network).tell_all([nat.address])

    def read(self) -> list[tuple[NatAddress, Mac]]:
        """Every use of such an address by another machine that was heard; never blocks.

        Another machine that asks for what we are asking for counts as using it if its MAC is lower
        than ours: one of the two has to wait (RFC 5227, section 2.1.1, has both do so).
        """
        uses: dict[NatAddress, Mac] = {}
        for _ in range(_FRAMES_A_READ):
            try:
                frame, (uplink, *_) = self._socket.recvfrom(_SNAPLEN)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno == errno.ENETDOWN:
                    continue
                raise KernelFault(f"listening to ARP: {error.strerror}", error.errno or 0) from None
            nat = self._used(frame, uplink)
            if nat is not None:
                uses[nat] = Mac(frame[SENDER_MAC].hex(":"))
        return list(uses.items())

    def close(self) -> None:
        """Close the sockets."""
        self._socket.close()
        for announcer in self._announcers.values():
            announcer.close()

    def _used(self, frame: bytes, uplink: str) -> NatAddress | None:
        sender = frame[SENDER]
        if sender != _NO_ADDRESS:
            return self._watched.get((uplink, sender))
        nat = self._watched.get((uplink, frame[TARGET]))
        if nat in self._asking and frame[SENDER_MAC] < self._announcer(nat.network).mac():
            return nat
        return None

    def _watch(self, nat: NatAddress) -> None:
        key = self._uplinks[nat.network], nat.address.packed
        if key not in self._watched:
            self._watched[key] = nat
            self._watch_only()

    def _watch_only(self) -> None:
        """Hear nothing but frames of these addresses, and questions about them."""
        numbers = sorted({int.from_bytes(address, "big") for _, address in self._watched})
        wanted = [equals(number, KEEP) for number in numbers]
        attach(
            self._socket,
            assemble(
                ("sender", [load_word(SENDER.start), equals(0, "target"), *wanted]),
                ("unwanted", [equals(0, DROP, DROP)]),
                ("target", [load_word(TARGET.start), *wanted, equals(0, DROP, DROP)]),
            ),
        )

    def _announcer(self, network: NetworkName) -> ArpAnnouncer:
        uplink = self._uplinks[network]
        if uplink not in self._announcers:
            self._announcers[uplink] = ArpAnnouncer(uplink)
        return self._announcers[uplink]
