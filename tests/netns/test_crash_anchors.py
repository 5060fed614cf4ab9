"""An agent is killed while flows move from one anchor to another: they go on, at one of them.

As in `test_crash`, but the NAT addresses can move: ap1 drains, and ap3 continues its flows.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from apagent.lab.faults import Faults
from tests.netns.conftest import MakeLab
from tests.netns.deaths import some, tell_to_die, wait_died
from tests.netns.observe import ask, becomes, sessions
from tests.netns.test_crash import Domain, as_before, in_use
from tests.netns.test_dead_anchors import holders

pytestmark = pytest.mark.netns

HOLDER, HEIR, THIRD = "ap1", "ap3", "ap2"
MOVED_S = 10.0


@pytest.fixture(scope="module")
def domain(module_lab: MakeLab) -> Iterator[Domain]:
    options = {HOLDER: f'successor = "{HEIR}"\n'}
    lab = module_lab(aps=3, clients=2, takeover=True, options=options)
    for ap in lab.aps:
        assert holders(lab, ap) == [ap]
    with in_use(lab) as made:
        yield made


def command(domain: Domain, verb: str) -> None:
    """Ask the holder's agent for something; it may die of it."""
    domain.lab.run(HOLDER, ["apctl", verb], check=False)


def goes_on(domain: Domain) -> None:
    """Every flow goes on, and one AP has the address; all agree on who anchors what."""
    becomes(lambda: len(holders(domain.lab, HOLDER)), 1, MOVED_S)
    becomes(lambda: set(domain.traffic.lately_lost().values()), {0}, MOVED_S)
    assert domain.traffic.ended() == {}
    becomes(lambda: len({frozenset(sessions(domain.lab, ap)) for ap in alive(domain)}), 1)


def alive(domain: Domain) -> list[str]:
    return [ap for ap in domain.lab.aps if domain.lab.agents.process(ap) is not None]


def back_at(domain: Domain) -> None:
    """The flows and the address are where they belong again."""
    command(domain, "undrain")
    becomes(lambda: ask(domain.lab, HOLDER, "status")["in_sync"], wanted=True)
    command(domain, "reclaim")
    becomes(lambda: holders(domain.lab, HOLDER), [HOLDER], MOVED_S)
    goes_on(domain)


DRAINS = (
    (HOLDER, "before 1 apagent.kernel.nat_addresses:delete"),
    (HOLDER, "before 1 apagent.kernel.conntrack:LinuxFlowMonitor.end"),
    (HEIR, "after 1 apagent.kernel.conntrack:LinuxFlowMonitor.adopt"),
    (HEIR, "after 2 apagent.core.feed:FeedLog.append"),
    (THIRD, "before 1 apagent.kernel.linux:LinuxDataPath.apply"),
    (HOLDER, "before 1 apagent.core.feed:FeedLog.append"),
    (HOLDER, "after 1 apagent.core.feed:FeedLog.append"),
    (HOLDER, "after 1 apagent.kernel.linux:LinuxDataPath.apply"),
    (HOLDER, "after 1 apagent.kernel.nat_addresses:delete"),
    (HOLDER, "after 1 apagent.kernel.conntrack:LinuxFlowMonitor.end"),
    (HEIR, "before 1 apagent.kernel.conntrack:LinuxFlowMonitor.adopt"),
    (HEIR, "after 1 apagent.kernel.nat_addresses:install"),
    (THIRD, "after 1 apagent.kernel.linux:LinuxDataPath.apply"),
)


@pytest.mark.parametrize(("ap", "step"), some(DRAINS, 5))
def test_it_dies_while_an_ap_drains(domain: Domain, ap: str, step: str) -> None:
    with as_before(domain, ap, may_lose=True, may_move=True):
        tell_to_die(domain.lab, ap, step)
        command(domain, "drain")
        wait_died(domain.lab, ap)
        domain.lab.start_agent(ap)
        goes_on(domain)
        back_at(domain)


RETURNS = (
    (HOLDER, "after 1 apagent.kernel.nat_addresses:install"),
    (HEIR, "before 1 apagent.kernel.conntrack:LinuxFlowMonitor.end"),
    (HEIR, "after 1 apagent.core.feed:FeedLog.append"),
    (HOLDER, "after 1 apagent.kernel.conntrack:LinuxFlowMonitor.adopt"),
)


@pytest.mark.parametrize(("ap", "step"), some(RETURNS, 2))
def test_it_dies_while_flows_return(domain: Domain, ap: str, step: str) -> None:
    with as_before(domain, ap, may_lose=True, may_move=True):
        command(domain, "drain")
        becomes(lambda: holders(domain.lab, HOLDER), [HEIR], MOVED_S)
        goes_on(domain)
        command(domain, "undrain")
        tell_to_die(domain.lab, ap, step)
        command(domain, "reclaim")
        wait_died(domain.lab, ap)
        domain.lab.start_agent(ap)
        goes_on(domain)
        back_at(domain)


SUCCESSIONS = (
    "after 1 apagent.kernel.conntrack:LinuxFlowMonitor.adopt",
    "before 1 apagent.kernel.conntrack:LinuxFlowMonitor.adopt",
)


@pytest.mark.parametrize("step", some(SUCCESSIONS, 1))
def test_it_dies_while_it_succeeds_a_dead_anchor(domain: Domain, step: str) -> None:
    """Another one succeeds, unless the address was taken: then its taker has two seconds."""
    faults = Faults(domain.lab)
    with as_before(domain, HEIR, may_lose=True, may_move=True):
        tell_to_die(domain.lab, HEIR, step)
        faults.power_off(HOLDER)
        wait_died(domain.lab, HEIR)
        domain.lab.start_agent(HEIR)
        goes_on(domain)
        faults.power_on(HOLDER)
        back_at(domain)
