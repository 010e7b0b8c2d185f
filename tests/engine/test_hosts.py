"""Where roles are placed, and what becomes of those on a host that does not answer."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from tricorn.engine.base import Gone
from tricorn.engine.hosts import KILL_SECONDS, HostsEngine, Placement, on_hosts
from tricorn.errors import ClusterError, UsageError
from tricorn.plan import Plan
from tricorn.testing.clock import VirtualClock


class Member:
    """A host's engine as its composition sees it."""

    def __init__(self, host: str, facts: str = "facts") -> None:
        self.host = host
        self.pids: dict[str, int] = {}
        self.news: list[Gone] = []
        self.broken = ""
        self.killed: list[tuple[str, int]] = []
        self.closed = 0
        self._facts = facts
        self._sock = socket.socket()

    def begin_load(self, plan: object) -> None:
        self._asked = plan

    def loaded(self) -> tuple[str, tuple[str, int]]:
        assert self._asked == "plan"
        return self._facts, (self.host, 7)

    def start(self, spec: SimpleNamespace) -> None:
        self.pids[spec.role] = 100 + spec.incarnation

    def kill(self, role: str, incarnation: int) -> None:
        self.killed.append((role, incarnation))

    def gone(self) -> list[Gone]:
        if self.broken:
            raise ClusterError(self.broken)
        news, self.news = self.news, []
        for gone in news:
            del self.pids[gone.role]
        return news

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self, patience: float = 1.0) -> None:
        self.closed += 1
        self._sock.close()


class World:
    def __init__(self, hosts: int) -> None:
        self.clock = VirtualClock()
        self.members = [Member(f"198.18.0.{host + 1}") for host in range(hosts)]
        self.engine = HostsEngine(self.members, self.clock.now)
        self.lives: dict[str, int] = {}

    def start(self, *roles: str) -> None:
        for role in roles:
            self.lives[role] = self.lives.get(role, 0) + 1
            plan = Plan(strategy="ps", workers=2, servers=2)
            self.engine.start(SimpleNamespace(role=role, incarnation=self.lives[role], plan=plan))

    def homes(self) -> list[set[str]]:
        return [set(member.pids) for member in self.members]

    def end(self, host: int, role: str) -> None:
        self.members[host].news.append(Gone(role, self.lives[role], "exit code 1"))


@pytest.fixture
def world() -> Iterator[World]:
    made = World(3)
    made.start("coordinator", "worker-0", "worker-1", "server-0", "server-1")
    yield made
    made.engine.close()
    assert [member.closed for member in made.members] == [1, 1, 1]


def test_roles_go_round_and_the_coordinator_is_on_the_first(world):
    assert world.homes() == [{"coordinator", "worker-0", "server-1"}, {"worker-1"}, {"server-0"}]
    assert world.engine.pids == dict.fromkeys(world.lives, 101)


def test_a_role_that_ends_by_itself_comes_back_where_it_was(world):
    world.end(1, "worker-1")
    assert world.engine.gone() == [Gone("worker-1", 1, "exit code 1")]
    world.start("worker-1")
    assert world.homes()[1] == {"worker-1"}


def test_a_role_that_had_to_be_ended_comes_back_on_the_next_host(world):
    world.engine.kill("worker-1", 1)
    assert world.members[1].killed == [("worker-1", 1)]
    world.end(1, "worker-1")
    assert len(world.engine.gone()) == 1
    world.start("worker-1")
    assert world.homes()[1:] == [set(), {"server-0", "worker-1"}]
    world.clock.advance(2 * KILL_SECONDS)
    assert world.engine.gone() == []


def test_a_life_that_is_over_is_not_ended_again(world):
    world.engine.kill("worker-1", 0)
    world.clock.advance(2 * KILL_SECONDS)
    assert world.engine.gone() == []
    assert world.members[1].killed == []


def test_a_host_that_does_not_end_a_role_in_time_is_given_up_for_good(world):
    world.start("worker-4")
    world.engine.kill("worker-1", 1)
    assert world.engine.gone() == []
    world.clock.advance(KILL_SECONDS + 0.1)
    assert sorted(world.engine.gone()) == [
        Gone("worker-1", 1, "its host 198.18.0.2 is lost: it does not answer"),
        Gone("worker-4", 1, "its host 198.18.0.2 is lost: it does not answer"),
    ]
    assert world.members[1].closed == 1
    assert "worker-1" not in world.engine.pids
    world.start("worker-1", "worker-4")
    assert world.homes()[1:] == [{"worker-1", "worker-4"}, {"server-0", "worker-1", "worker-4"}]


def test_a_host_whose_warm_process_is_gone_is_given_up(world):
    world.members[2].broken = "killed by signal 9"
    assert world.engine.gone() == [Gone("server-0", 1, "its host 198.18.0.3 is lost: killed by signal 9")]
    assert world.engine.gone() == []


def test_without_the_host_of_the_coordinator_the_run_ends(world):
    world.engine.kill("coordinator", 1)
    world.clock.advance(KILL_SECONDS + 0.1)
    with pytest.raises(ClusterError, match=r"host of the coordinator, 198\.18\.0\.1, is lost: it does not answer"):
        world.engine.gone()


def test_the_job_is_loaded_on_each_host_and_is_the_same_everywhere(world):
    assert world.engine.load("plan") == ("facts", ("198.18.0.1", 7))
    world.members[2]._facts = "others"
    with pytest.raises(UsageError, match=r"not the same on 198\.18\.0\.3 as on 198\.18\.0\.1"):
        world.engine.load("plan")


def test_the_coordinator_never_moves():
    placement, plan = Placement(2), Plan(strategy="dp", workers=1, hosts=(1,))
    placement.silent("coordinator")
    assert placement.host("coordinator", plan) == 0


def test_a_plan_says_on_which_hosts_roles_are():
    plan, placement = Plan(strategy="ps", workers=3, servers=1, hosts=(3, 1)), Placement(4)
    roles = ["worker-0", "worker-1", "worker-2", "server-0"]
    assert [placement.host(role, plan) for role in roles] == [3, 1, 3, 1]
    placement.silent("worker-1")
    assert [placement.host(role, plan) for role in roles] == [3, 0, 3, 1]  # on the next that there is
    placement.lost |= {0, 3}
    assert [placement.host(role, plan) for role in roles] == [1, 2, 1, 1]
    assert placement.host("coordinator", plan) == 0


def test_no_hosts():
    with pytest.raises(UsageError, match="no hosts"):
        on_hosts()
