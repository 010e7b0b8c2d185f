"""A run on a virtual clock: what the equations say where nothing scatters, and what theory says where it does."""

from __future__ import annotations

import time
from statistics import mean
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from tricorn.errors import PlanError
from tricorn.mp.schedule import order
from tricorn.mp.simulate import Work
from tricorn.mp.simulate import simulate as carried_out
from tricorn.plan import Plan
from tricorn.planner.cluster import Cluster
from tricorn.planner.figures import Curve
from tricorn.planner.parts import Line, waiting
from tricorn.planner.profile import Profile
from tricorn.planner.simulation import Simulation, agreed, simulate
from tricorn.planner.simulation.agreed import fair

from .world import apart, ground, profile, recommender


def calm(plan: Plan, cluster: Cluster | None, job: Profile | None = None) -> Simulation:
    """Where nothing was measured to scatter, either."""
    job = job or profile()
    still = {name: curves_without_scatter(getattr(job, name)) for name in ("compute", "update")}
    return simulate(plan, ground(replace(job, **still), cluster), steps=20, calm=True)


def curves_without_scatter(curves: dict[str, Curve]) -> dict[str, Curve]:
    return {key: Curve(tuple(p._replace(scatter=0.0) for p in curve.points)) for key, curve in curves.items()}


@pytest.mark.parametrize(
    "plan",
    [
        Plan(strategy="dp", workers=4),
        Plan(strategy="dp", workers=4, zero=3),
        Plan(strategy="dp", workers=4, local_steps=8),
        Plan(strategy="ps", workers=3, servers=1),
        Plan(strategy="ps", workers=3, servers=1, consistency="asp"),
        Plan(strategy="ps", workers=3, servers=1, consistency="ssp"),
        Plan(strategy="mp", workers=4, microbatches=8),
        Plan(strategy="mp", workers=4, microbatches=8, replicas=2, schedule="zero-bubble"),
        Plan(strategy="mp", workers=2, microbatches=8, schedule="interleaved", chunks=2),
    ],
)
@pytest.mark.parametrize("mbit", [100.0, 100_000.0])
def test_without_noise_it_is_the_equation(plan: Plan, mbit: float) -> None:
    found = calm(plan, apart(4, mbit=mbit))
    assert found.median == pytest.approx(found.p90, rel=1e-6)
    assert found.mean == pytest.approx(found.predicted, rel=0.02)
    assert (found.failures, found.lost_seconds) == (0, 0.0)


@pytest.mark.parametrize("microbatches", [1, 8])
def test_hosts_that_grant_a_part_of_a_core_do_so_in_both(microbatches: int) -> None:
    plan = Plan(strategy="mp", workers=4, microbatches=microbatches)
    found = calm(plan, apart(4, mbit=100_000.0, cores=0.3))
    assert found.mean == pytest.approx(found.predicted, rel=0.02)


def test_on_one_machine_it_is_the_equation_too() -> None:
    for plan in (
        Plan(strategy="dp", workers=4),
        Plan(strategy="ps", workers=2, servers=1, consistency="asp"),
        Plan(strategy="ps+dp", workers=2, servers=1),
    ):
        found = calm(plan, None, recommender())
        assert found.mean == pytest.approx(found.predicted, rel=0.02), plan


def test_a_seed_says_all() -> None:
    on = ground(cluster=stalling(8, 0.05))
    for plan in (Plan(strategy="dp", workers=8), Plan(strategy="ps", workers=7, servers=1, consistency="ssp")):
        one, same, other = (simulate(plan, on, steps=40, seed=seed) for seed in (1, 1, 2))
        assert one == same
        assert one.mean != other.mean


def test_the_doubt_of_a_busy_machine_is_drawn_once() -> None:
    on = ground(profile(batch=5.0, busy=0.4), apart(64, mbit=100_000.0))
    found = [simulate(Plan(strategy="dp", workers=64), on, steps=20, seed=seed) for seed in range(3)]
    assert all(each.p90 == pytest.approx(each.median) for each in found)
    assert all(each.waiting["worker"] == pytest.approx(0, abs=1e-6) for each in found)
    assert len({each.mean for each in found}) == 3
    assert found[0].busy == 0.4


def stalling(count: int, share: float, **host: Any) -> Cluster:
    return apart(count, mbit=100_000.0, stalls=share, stall_times=10.0, **host)


def test_the_slowest_of_many_is_awaited_as_expected() -> None:
    """The closed form of the largest of many, and of stalls, beside what is drawn."""
    for cluster in (apart(64, mbit=100_000.0), stalling(64, 0.01)):
        found = simulate(Plan(strategy="dp", workers=64), ground(profile(batch=5.0), cluster), steps=2000)
        assert found.difference == pytest.approx(0, abs=0.03)
        assert found.waiting["worker"] > 0.02


def test_asynchronous_workers_do_not_wait_for_who_stalls() -> None:
    on = ground(profile(elements=20_000, batch=2.0), stalling(16, 0.02))
    together, apart_ = (
        simulate(Plan(strategy="ps", workers=15, servers=1, consistency=how), on, steps=300) for how in ("bsp", "asp")
    )
    assert together.waiting["worker"] > 0.4
    assert apart_.waiting["worker"] < 0.05
    assert together.staleness == {"0": 300 * 15}


@pytest.mark.parametrize("staleness", [0, 2, 6])
def test_a_bound_on_staleness_holds_all_to_the_pace_of_the_slowest(staleness: int) -> None:
    """SSP (Ho et al. 2013): who is ahead by the bound waits; who is slow for ever sets everybody's pace."""
    unlike = Cluster(hosts=(*apart(4, mbit=1e5).hosts, *apart(1, mbit=1e5, speed=0.25).hosts), described=True)
    on = ground(profile(elements=20_000, batch=1.0), unlike)
    plan = Plan(strategy="ps", workers=5, servers=1, consistency="ssp", staleness=staleness)
    found, free = (simulate(each, on, steps=200, calm=True) for each in (plan, replace(plan, consistency="asp")))
    assert found.mean == pytest.approx(4 * 1.0 / 5, rel=0.1)  # the slowest makes one of five updates
    assert free.mean == pytest.approx(1 / (4 / 1.0 + 1 / 4.0), rel=0.1)
    ages = [int(age.split("-")[0]) for age in found.staleness]
    assert max(ages) <= 4 * (2 * staleness + 2)  # each of the others is at most so many clocks around it
    assert found.waiting["worker"] > free.waiting["worker"] + 0.3


def test_updates_are_as_old_as_there_are_others() -> None:
    on = ground(profile(elements=20_000, batch=1.0), apart(9, mbit=1e5))
    found = simulate(Plan(strategy="ps", workers=8, servers=1, consistency="asp"), on, steps=200)
    count = sum(found.staleness.values())
    assert count == 8 * 200
    assert mean([int(age) for age, times in found.staleness.items() for _ in range(int(times))]) == pytest.approx(
        7, abs=1
    )


def test_failures_cost_what_is_expected_of_them() -> None:
    on = ground(profile(batch=20.0, samples=64_000, epochs=50), apart(64, mbit=100_000.0, failures_per_day=10.0))
    for plan in (Plan(strategy="dp", workers=64), Plan(strategy="dp", workers=64, zero=3)):
        found = simulate(plan, on, steps=10)
        quiet = simulate(plan, on, steps=10, calm=True)
        assert found.failures > 50
        expected = found.failures * (13 + 15 * (plan.zero == 3))
        assert found.lost_seconds == pytest.approx(expected, rel=0.15)
        assert (quiet.failures, quiet.lost_seconds) == (0, 0)


@given(
    st.integers(1, 4), st.integers(1, 9), st.sampled_from(["1f1b", "gpipe", "zero-bubble", "interleaved"]),
    st.lists(st.floats(0.01, 5), min_size=24, max_size=24), st.floats(0, 1),
)  # fmt: skip
def test_pipelines_are_carried_out_as_the_schedules_own_simulator_does(
    stages: int, microbatches: int, schedule: Any, seconds: list[float], hop: float
) -> None:
    chunks = 2 if schedule == "interleaved" and stages > 1 else 1
    schedule = schedule if chunks == 2 or schedule != "interleaved" else "1f1b"
    orders = tuple(tuple(order(schedule, rank, stages, microbatches, chunks)) for rank in range(stages))
    works = tuple(Work(*seconds[3 * at : 3 * at + 3]) for at in range(stages * chunks))
    each = {"granted": (1.0,) * stages, "working": (0.0,) * stages}
    line = Line(orders=orders, works=works, hop=hop, replicas=1, **each)
    (found,) = agreed.carried_out(line, agreed.moves(line), np.ones((1, 1, stages))).flatten().tolist()
    assert found == pytest.approx(carried_out(orders, works, hop).seconds)


def test_a_link_is_shared_fairly() -> None:
    assert fair([0.0, 0.0, 0.0], 2.0) == [6.0, 6.0, 6.0]
    assert fair([0.0, 1.0], 2.0) == pytest.approx([3.0, 4.0])
    assert fair([0.0, 5.0], 2.0) == [2.0, 7.0]


@given(st.lists(st.floats(0, 100), min_size=1, max_size=30), st.floats(0.01, 10))
def test_a_link_is_never_idle_while_something_waits(begun: list[float], seconds: float) -> None:
    begun = sorted(begun)
    ended = fair(begun, seconds)
    assert ended == sorted(ended)
    free, last = 0.0, 0.0
    for begin in begun:  # the last one is through when one after another would be
        free = max(free, begin) + seconds
    last = ended[-1]
    assert last == pytest.approx(free)
    assert all(end >= begin + seconds * (1 - 1e-9) for begin, end in zip(begun, ended, strict=True))


@pytest.mark.parametrize(
    "plan",
    [
        Plan(strategy="dp", workers=10_000),
        Plan(strategy="mp", workers=10_000, replicas=1250, microbatches=16),
        Plan(strategy="ps", workers=9_900, servers=100),
        Plan(strategy="ps", workers=9_900, servers=100, consistency="ssp"),
    ],
)
def test_ten_thousand_workers_take_seconds(plan: Plan) -> None:
    job = profile(batch=100.0, batch_size=40_000)
    on = ground(job, stalling(10_000, 0.001, failures_per_day=0.1))
    began = time.process_time()
    found = simulate(plan, on, steps=5)
    assert found.mean > 0
    assert time.process_time() - began < 15


def test_what_cannot_be_predicted_cannot_be_simulated() -> None:
    with pytest.raises(PlanError, match="it branches on its data"):
        simulate(Plan(strategy="mp", workers=2), ground(profile(layers=(), no_layers="it branches on its data")))


def test_waiting_for_equal_and_unlike_workers() -> None:
    assert waiting([1.0, 3.0], 0.0, [(0.0, 1.0)] * 2) == 1.0
    assert waiting([1.0] * 2, 0.0, [(0.5, 3.0)] * 2) == 0.75 * 2
    assert 0 < waiting([1.0] * 4, 0.05, [(0.0, 1.0)] * 4, steps=16) < waiting([1.0] * 4, 0.05, [(0.0, 1.0)] * 4)
