"""From one layout of the table to another on the real kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from apagent.core.domain import Domain
from apagent.kernel.nft import NftTable, ruleset
from apagent.kernel.nft.messages import SetDefinition
from apagent.kernel.nft.sets import Names, definitions
from apagent.kernel.port import NetworkState
from apagent.kernel.wire import Netlink
from tests.contract.conftest import run
from tests.contract.test_nft import DOMAIN, STATE, arrivals
from tests.domains import AP2, LAN, tcp

pytestmark = [pytest.mark.netns, pytest.mark.usefixtures("access_point")]

NAMES = Names.of(LAN)
MANY = 50_000
"""More elements than fit the socket's usual buffer."""


@pytest.fixture
def former(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Leaves a table behind that holds `STATE`, with some sets defined in another way."""

    def leave(*sets: SetDefinition, state: NetworkState = STATE) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(ruleset, "definitions", lambda domain: _defined(domain, sets))
            table = NftTable()
            table.prepare(DOMAIN)
            table.release_hold(DOMAIN)
            table.apply(DOMAIN, {LAN: arrivals(state)})
            table.close()

    return leave


def _defined(domain: Domain, sets: tuple[SetDefinition, ...]) -> dict[str, SetDefinition]:
    return definitions(domain) | {set_.name: set_ for set_ in sets}


@pytest.fixture
def table() -> Iterator[NftTable]:
    made = NftTable()
    yield made
    made.close()


def listing() -> str:
    return run("nft", "--stateless", "list", "ruleset")


def test_maps_of_another_layout_keep_what_they_hold(
    former: Callable[..., None], table: NftTable
) -> None:
    former()
    as_new = sorted(listing().split())
    run("nft", "delete", "table", "inet", "apagent")
    sets = definitions(DOMAIN)
    former(
        replace(sets[NAMES.flows], key_type=1),
        replace(sets[NAMES.sockets], data_type=7),
        replace(sets[NAMES.known], key_type=1),
    )
    assert sorted(listing().split()) != as_new
    table.prepare(DOMAIN)
    assert table.read(DOMAIN) == {LAN: STATE}
    table.close()  # else nft names the owner
    assert sorted(listing().split()) == as_new


@pytest.mark.parametrize("is_granted", [True, False], ids=["granted", "refused"])
def test_a_map_that_holds_more_than_the_sockets_buffer_is_carried_over_too(
    former: Callable[..., None],
    table: NftTable,
    monkeypatch: pytest.MonkeyPatch,
    is_granted: bool,
) -> None:
    if not is_granted:
        monkeypatch.setattr(Netlink, "_make_room", lambda *_: False)
    many = replace(STATE, flows={tcp(port): AP2 for port in range(MANY)})
    former(replace(definitions(DOMAIN)[NAMES.flows], key_type=1), state=many)
    table.prepare(DOMAIN)
    assert table.read(DOMAIN) == {LAN: many}


def test_a_table_of_the_future_is_adopted_and_what_it_can_not_say_is_dropped(
    former: Callable[..., None], table: NftTable
) -> None:
    sets = definitions(DOMAIN)
    former(replace(sets[NAMES.echoes], name="lan_echoes6"), replace(sets["left"], key_type=1))
    run("nft", "add chain inet apagent to_come { type filter hook prerouting priority -310; }")
    run("nft", "add rule inet apagent to_come ip saddr 192.0.2.1 goto anchor_ap2")
    run("nft", "add map inet apagent ways6 { type ether_addr : verdict; }")
    run("nft", "add element inet apagent ways6 { 02:00:00:00:00:01 : goto anchor_ap2 }")
    run("nft", "add counter inet apagent seen6")
    table.prepare(DOMAIN)
    assert table.read(DOMAIN) == {LAN: STATE}
    assert not {"to_come", "ways6", "seen6", "lan_echoes6"}.intersection(listing().split())
