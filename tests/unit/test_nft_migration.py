"""What is carried over from one layout of the nftables table to another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from apagent.kernel.nft.elements import ElementChange, pack_data
from apagent.kernel.nft.installed import Installed
from apagent.kernel.nft.messages import SetDefinition
from apagent.kernel.nft.migration import Former, Migration, anchor_numbers, moves
from apagent.kernel.nft.sets import Names, anchor_value, definitions
from tests.domains import AP2, AP3, LAN, domain

DOMAIN = domain()
WANTED = definitions(DOMAIN)
NAMES = Names.of(LAN)
FLOWS = WANTED[NAMES.flows]
KEY, VALUE = b"k" * 20, anchor_value(7)


def changes(
    *installed: SetDefinition, migrations: dict[Former, Migration] | None = None
) -> list[ElementChange]:
    """How `KEY` with `VALUE` in each of the installed sets is carried over."""
    found = moves(DOMAIN, {set_.name: set_ for set_ in installed}, WANTED, migrations or {})
    return [change for move in found for change in move.changes({KEY: VALUE})]


def put(set_: str, key: bytes = KEY, value: bytes = VALUE) -> ElementChange:
    return ElementChange(set_, key, deleted=False, data=pack_data(value))


def test_nothing_is_carried_over_where_nothing_changes() -> None:
    assert changes(*WANTED.values()) == []


def test_a_map_that_is_laid_out_in_the_same_way_keeps_its_elements() -> None:
    assert changes(replace(FLOWS, key_type=1)) == [put(NAMES.flows)]


def test_a_map_of_an_unknown_layout_is_emptied_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert changes(replace(FLOWS, key_length=24)) == []
    assert "lan_flows is of a layout that this release doesn't know" in caplog.text


def test_what_expires_and_verdicts_are_made_anew_in_silence(
    caplog: pytest.LogCaptureFixture,
) -> None:
    anchors, left = WANTED[NAMES.anchors], WANTED["left"]
    assert changes(replace(anchors, key_type=1), replace(left, key_type=1)) == []
    assert caplog.text == ""


def without_protocol(key: bytes, value: bytes) -> Iterable[tuple[bytes, bytes]]:
    """A former map's elements, which were of TCP and UDP alike."""
    return ((key[:8] + b"\6" + key[8:19], value), (key[:8] + b"\x11" + key[8:19], value))


def test_a_known_layout_is_converted() -> None:
    former = replace(FLOWS, key_length=16)
    known = {Former("flows", 16, 4): Migration("flows", without_protocol)}
    assert changes(former, migrations=known) == [
        put(NAMES.flows, KEY[:8] + protocol + KEY[8:19]) for protocol in (b"\6", b"\x11")
    ]


def test_a_set_may_have_had_another_name() -> None:
    known = {Former("uplink4", 20, 4): Migration("flows", lambda key, value: [(key, value)])}
    former = replace(FLOWS, name="lan_uplink4")
    assert changes(former, migrations=known) == [put(NAMES.flows)]
    assert changes(replace(former, name="other_uplink4"), migrations=known) == []


def test_what_was_carried_over_by_a_run_that_died_is_not_carried_over_again() -> None:
    known = {Former("uplink4", 20, 4): Migration("flows", lambda key, value: [(key, value)])}
    assert changes(replace(FLOWS, name="lan_uplink4"), FLOWS, migrations=known) == []


def test_numbers_of_anchors_by_comments_and_before_there_were_any_by_verdicts() -> None:
    verdicts = {
        "lan_anchors": {anchor_value(4): "anchor_ap2", anchor_value(5): "anchor_ap3"},
        "senders": {b"\2\0\0\0\0\1": "anchor_ap2"},
    }
    former = Installed(0, None, verdicts=verdicts, comments={"anchor_ap2": ["apagent 0123", ""]})
    assert anchor_numbers(former) == {AP2: 4, AP3: 5}
    diverted = {"lan_anchors": dict.fromkeys(verdicts["lan_anchors"], "anchor_ap3")}
    comments = {"anchor_ap2": ["apagent 0123 4"], "anchor_ap3": ["apagent 0123 5"]}
    present = Installed(0, None, verdicts=diverted, comments=comments)
    assert anchor_numbers(present) == {AP2: 4, AP3: 5}
