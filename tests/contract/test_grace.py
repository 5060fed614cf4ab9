"""A client that arrives or leaves costs the roam one transaction, however often it does."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from apagent.kernel.nft import NftTable
from apagent.kernel.port import Change, NetworkDelta
from apagent.kernel.wire import Message, Netlink
from tests.domains import ANN, ANN_IP, AP2, LAN, domain

pytestmark = [pytest.mark.netns, pytest.mark.usefixtures("access_point")]

HERE = NetworkDelta(
    known={ANN_IP: Change(None, ANN)},
    elsewhere={ANN_IP: Change(ANN, None)},
    places={ANN_IP: Change(AP2, None)},
)
ELSEWHERE = NetworkDelta(
    known={ANN_IP: Change(ANN, None)},
    elsewhere={ANN_IP: Change(None, ANN)},
    places={ANN_IP: Change(None, AP2)},
)


def test_it_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed one is harmless and slow: the kernel waits for all its processors."""
    table = NftTable()
    table.prepare(domain())
    table.apply(domain(), {LAN: NetworkDelta(known={ANN_IP: Change(None, ANN)})})
    tried: list[str] = []
    transaction = Netlink.transaction

    def noted(self: Netlink, begin: Message, batch: Sequence[Message], end: Message) -> None:
        tried.append("tried")
        transaction(self, begin, batch, end)
        tried[-1] = "succeeded"

    monkeypatch.setattr(Netlink, "transaction", noted)
    for _ in range(3):
        for delta in (ELSEWHERE, HERE):
            table.apply(domain(), {LAN: delta})
    table.close()
    assert tried == ["succeeded"] * 6
