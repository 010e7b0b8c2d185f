"""Every step is lent to one worker at a time, and committed once all servers have applied it."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tricorn.control.intervals import Intervals
from tricorn.control.leases import Leases

WORKERS = ("worker-0", "worker-1", "worker-2")
STEPS = st.integers(0, 24)


def numbers(steps: Intervals) -> set[int]:
    return {step for start, stop in steps.pairs for step in range(start, stop)}


class LeasesAgainstSets(RuleBasedStateMachine):
    """The same events go to Leases and to plain sets."""

    @initialize(held=st.lists(st.sets(STEPS), min_size=1, max_size=3))
    def begin(self, held: list[set[int]]) -> None:
        self.applied = {f"server-{i}": set(steps) for i, steps in enumerate(held)}
        self.leases = Leases({s: Intervals((n, n + 1) for n in steps) for s, steps in self.applied.items()})
        self.lent: dict[int, str] = {}
        self.credit = dict.fromkeys(WORKERS, 0)

    def committed(self) -> set[int]:
        return set.intersection(*self.applied.values())

    @rule(worker=st.sampled_from(WORKERS), steps=st.integers(0, 3))
    def want(self, worker: str, steps: int) -> None:
        self.leases.want(worker, steps)
        self.credit[worker] += steps

    @rule(by=st.integers(0, 6))
    def go_further(self, by: int) -> None:
        self.leases.limit += by

    @rule()
    def grant(self) -> None:
        free = [n for n in range(self.leases.limit) if n not in self.committed() and n not in self.lent]
        granted = self.leases.grants()
        given_out = [step for steps in granted.values() for step in steps]
        assert sorted(given_out) == free[: sum(self.credit.values())], "the first free steps, each to one worker"
        for worker, steps in granted.items():
            assert steps == sorted(steps)
            self.credit[worker] -= len(steps)
            assert self.credit[worker] >= 0, "a worker got more than it wanted"
            self.lent.update(dict.fromkeys(steps, worker))

    @precondition(lambda self: self.lent)
    @rule(data=st.data())
    def apply(self, data: st.DataObject) -> None:
        server = data.draw(st.sampled_from(sorted(self.applied)))
        steps = data.draw(st.lists(st.sampled_from(sorted(self.lent)), max_size=4))  # with repetitions
        before = self.committed()
        self.applied[server].update(steps)
        done = self.leases.applied(server, steps)
        assert len(done) == len(set(done))
        assert set(done) == self.committed() - before

    @invariant()
    def agree(self) -> None:
        if hasattr(self, "leases"):
            assert numbers(self.leases.committed) == self.committed()
            assert self.leases.outstanding == len(self.lent.keys() - self.committed())
            assert all(step < self.leases.limit for step in self.lent)


LeasesAgainstSets.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestLeasesAgainstSets = LeasesAgainstSets.TestCase


def test_steps_go_to_those_who_want_them_in_turn():
    leases = Leases({"server-0": Intervals()})
    leases.limit = 5
    leases.want("worker-0", 3)
    leases.want("worker-1", 1)
    leases.want("worker-2", 4)
    assert leases.grants() == {"worker-0": [0, 3], "worker-1": [1], "worker-2": [2, 4]}
    assert leases.grants() == {}


def test_a_step_that_some_servers_have_is_lent_again_and_committed_by_the_others():
    leases = Leases({"server-0": Intervals([(0, 3)]), "server-1": Intervals([(0, 1), (2, 3)])})
    assert leases.committed.pairs == [(0, 1), (2, 3)]
    leases.limit = 4
    leases.want("worker-0", 4)
    assert leases.grants() == {"worker-0": [1, 3]}
    assert leases.applied("server-1", [1, 3]) == [1]
    assert leases.applied("server-0", [1, 3]) == [3]
    assert leases.outstanding == 0


@given(st.integers(0, 10), st.integers(0, 10))
def test_nothing_is_lent_across_the_limit(limit: int, wanted: int):
    leases = Leases({"server-0": Intervals()})
    leases.limit = limit
    leases.want("worker-0", wanted)
    assert leases.grants().get("worker-0", []) == list(range(min(limit, wanted)))


def test_a_torn_step_is_finished_before_the_run_rests():
    leases = Leases({"server-0": Intervals([(0, 2)]), "server-1": Intervals([(0, 1)])})
    leases.limit = 10
    assert leases.torn
    leases.want("worker-0", 2)
    assert leases.grants(torn_only=True) == {"worker-0": [1]}
    assert leases.grants(torn_only=True) == {}
    assert leases.applied("server-1", [1]) == [1]
    assert not leases.torn
    assert not leases.outstanding
    assert leases.grants() == {"worker-0": [2]}
