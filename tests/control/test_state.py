"""Exactly once, whatever happens and in whatever order: thousands of random runs of the coordinator."""

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from tricorn.control.instructions import End
from tricorn.control.intervals import Intervals
from tricorn.control.messages import Alive, Exited
from tricorn.control.state import Coordinator
from tricorn.errors import RoleFailed

from .world import Replicas, Servers, facts

seeds = st.integers(0, 2**32)


@settings(max_examples=300, deadline=None)
@given(seeds, st.sampled_from([1, 2, 3]), st.integers(0, 12))
def test_a_synchronous_run_ends_with_every_step_once(seed: int, workers: int, faults: int) -> None:
    world = Replicas(Random(seed), workers=workers, faults=faults)
    world.run()
    assert world.outcome == "done"
    assert world.committed.pairs == [(0, 15)]
    assert world.checkpoints[15][0] == list(range(15))
    # The share of a worker that dies while its peers are already past that step is lost; never that of the last step.
    assert 15 in world.evaluated
    assert world.deaths or sorted(world.evaluated) == [5, 10, 15]


@settings(max_examples=300, deadline=None)
@given(seeds, st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 3]), st.integers(0, 12))
def test_an_asynchronous_run_ends_with_every_step_once(seed: int, workers: int, servers: int, faults: int) -> None:
    world = Servers(Random(seed), workers=workers, servers=servers, faults=faults)
    world.run()
    assert world.outcome == "done"
    assert world.committed.pairs == [(0, 15)]
    assert sorted(world.evaluated) == [5, 10, 15]
    for i in range(servers):
        assert sorted(world.checkpoints[15][0]) == list(range(15)), f"server {i}"


def test_a_run_whose_worker_cannot_live_fails_with_a_remedy() -> None:
    coordinator = Coordinator(
        facts(1, 0, synchronous=True), epoch=0, committed=Intervals(), evaluated=set(), saved=-1,
        newest_checkpoint=lambda: None,
    )  # fmt: skip
    said = coordinator.launcher(Alive(roles={"worker-0": 0}, dead={}), 0.0)
    for life in range(coordinator.facts.barren_restarts + 1):
        said = coordinator.exited(Exited(role="worker-0", incarnation=life, reason="killed"), 0.0)
    (end,) = (instruction for instruction in said if isinstance(instruction, End))
    assert end.error is not None
    assert (end.outcome, end.error.kind, end.error.remedy) == ("failed", "RoleFailed", RoleFailed.remedy)
