"""The grace of a client that has just arrived costs the roam next to nothing."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from apagent.kernel.nft import NftTable
from apagent.kernel.wire import Message, Netlink
from tests.domains import ANN_IP, BEN_IP, LAN, domain

pytestmark = [pytest.mark.netns, pytest.mark.usefixtures("access_point")]


def test_it_takes_one_transaction_that_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed one is harmless and slow: the kernel waits for all its processors."""
    table = NftTable()
    table.prepare(domain())
    tried: list[str] = []
    transaction = Netlink.transaction

    def noted(self: Netlink, begin: Message, batch: Sequence[Message], end: Message) -> None:
        tried.append("tried")
        transaction(self, begin, batch, end)
        tried[-1] = "succeeded"

    monkeypatch.setattr(Netlink, "transaction", noted)
    for _ in range(2):
        table.welcome(LAN, [ANN_IP, BEN_IP])
    table.welcome(LAN, [])
    table.close()
    assert tried == ["succeeded", "succeeded"]
