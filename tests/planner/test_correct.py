"""What a run measures corrects the predictions of its job, term by term, by how much was measured."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from tricorn.plan import Plan
from tricorn.planner.correct import Factor, corrected
from tricorn.planner.ground import Ground
from tricorn.planner.prediction import Prediction
from tricorn.planner.replan import taught
from tricorn.planner.search import predicted

from .world import apart, ground, machine, profile, recommender

TWO = Plan(strategy="dp", workers=2)


def of(plan: Plan, on: Ground) -> Prediction:
    found = predicted(plan, on)
    assert isinstance(found, Prediction)
    return found


def measured(plan: Plan, on: Ground, compute: float = 1.0, data: float = 1.0, besides: float = 1.0) -> dict[str, float]:
    """What a run says in which terms take so many times as long as is predicted."""
    terms = of(plan, on).terms
    found = {"compute": compute * terms["compute"], "data": data * terms["data"], "waiting": compute * terms["waiting"]}
    found["exchange"] = besides * sum(value for term, value in terms.items() if term not in found)
    return {"step": sum(found.values()), **found}


def after(plan: Plan, on: Ground, said: dict[str, float], steps: float) -> Ground:
    return taught(on, [(plan, said, steps)])


@pytest.mark.parametrize(
    "plan",
    [
        TWO,
        Plan(strategy="dp", workers=1),
        Plan(strategy="ps", workers=2, servers=1),
        Plan(strategy="ps", workers=2, servers=1, consistency="asp"),
        Plan(strategy="mp", workers=2, microbatches=4),
    ],
    ids=lambda plan: f"{plan.strategy}{plan.workers}{plan.consistency}",
)
def test_the_next_prediction_is_what_was_seen(plan: Plan) -> None:
    on = ground(recommender() if plan.served else profile())
    said = measured(plan, on, compute=1.7, data=3.0, besides=0.4)
    taught = of(plan, after(plan, on, said, 10_000))
    assert taught.seconds == pytest.approx(said["step"], rel=0.01)
    assert taught.terms["data"] == pytest.approx(said["data"], rel=0.01)
    if plan.dense != "mp":  # whose workers compute and wait by turns, so that only both together are known
        assert taught.terms["compute"] == pytest.approx(said["compute"], rel=0.01)


def test_a_few_steps_teach_little_and_many_steps_all() -> None:
    on = ground()
    said = measured(TWO, on, compute=2.0)
    plain = of(TWO, on).terms["compute"]
    times = [of(TWO, after(TWO, on, said, steps)).terms["compute"] / plain for steps in (1, 20, 2000)]
    assert times == sorted(times)
    assert times[0] < 1.05
    # Computing has learned half of it then, and what is left of the step at most 20 of 120 of the other half.
    assert 2**0.5 <= times[1] <= 2 ** (0.5 + 0.5 * 20 / 120)
    assert times[2] > 1.98


def test_what_has_changed_since_is_learned_anew() -> None:
    on = ground()
    slow = after(TWO, on, measured(TWO, on, compute=3.0), 1_000_000)
    fast = after(TWO, slow, measured(TWO, on, compute=1.0), 20_000)
    assert of(TWO, fast).terms["compute"] == pytest.approx(of(TWO, on).terms["compute"], rel=0.15)


def test_the_same_run_again_changes_nothing() -> None:
    on = ground()
    said = measured(TWO, on, compute=1.5, besides=2.0)
    once = after(TWO, on, said, 100_000)
    again = after(TWO, once, said, 100_000)
    assert of(TWO, again).seconds == pytest.approx(of(TWO, once).seconds, rel=0.001)


def test_computing_is_the_jobs_and_exchanging_is_the_ways() -> None:
    on = ground()
    four, served = Plan(strategy="dp", workers=4), Plan(strategy="ps", workers=2, servers=1)
    taught = after(TWO, on, measured(TWO, on, compute=0.5, besides=5.0), 100_000)
    assert of(four, taught).terms["exchange"] == pytest.approx(5 * of(four, on).terms["exchange"], rel=0.01)
    for plan in (four, served):
        assert of(plan, taught).terms["compute"] == pytest.approx(0.5 * of(plan, on).terms["compute"], rel=0.01)
    assert of(served, taught).terms["exchange"] == pytest.approx(of(served, on).terms["exchange"])


@pytest.mark.parametrize(("compute", "besides", "common"), [(2, 5, 2), (5, 2, 2), (0.5, 0.2, 0.5), (2, 0.5, 1)])
def test_a_slower_machine_is_slower_at_what_was_not_seen_too(compute: float, besides: float, common: float) -> None:
    on, served = ground(), Plan(strategy="ps", workers=2, servers=1)
    taught = after(TWO, on, measured(TWO, on, compute=compute, besides=besides), 100_000)
    assert of(served, taught).terms["exchange"] == pytest.approx(common * of(served, on).terms["exchange"], rel=0.01)


def test_what_links_carry_is_not_corrected_by_another_way_of_exchanging() -> None:
    on, plans = ground(cluster=apart(2, mbit=100)), [TWO, msgspec.structs.replace(TWO, zero=1)]
    known = taught(on, [(plan, measured(plan, on, besides=3.0), 100_000) for plan in plans])
    served = Plan(strategy="ps", workers=2, servers=2)
    known = replace(known, cluster=msgspec.structs.replace(known.cluster, present=True))
    before, after = of(served, on).terms, of(served, known).terms
    assert after["wire"] == before["wire"]
    assert after["exchange"] > before["exchange"]


def test_of_another_way_no_more_seconds_are_missing_than_of_those_that_were_seen() -> None:
    on, cheap = ground(), [TWO, msgspec.structs.replace(TWO, local_steps=16)]
    costly = msgspec.structs.replace(TWO, zero=3)
    known = taught(on, [(plan, measured(plan, on, besides=20.0), 100_000) for plan in cheap])
    missing = max(of(plan, known).seconds - of(plan, on).seconds for plan in cheap)
    assert 0 < of(costly, known).seconds - of(costly, on).seconds <= 1.01 * missing


def test_threads_are_a_crowd_of_their_own() -> None:
    on = ground()
    narrow, wide = Plan(strategy="dp", workers=2, threads=1), Plan(strategy="dp", workers=2, threads=2)
    taught = after(narrow, on, measured(narrow, on, compute=2.0), 100_000)
    taught = after(wide, taught, measured(wide, on, compute=1.0), 100_000)
    times = [of(plan, taught).terms["compute"] / of(plan, on).terms["compute"] for plan in (narrow, wide)]
    assert times == pytest.approx([2.0, 1.0], rel=0.01)


def test_runs_here_say_nothing_of_links_elsewhere() -> None:
    here, there = ground(cluster=machine()), ground(cluster=apart(2))
    taught = after(TWO, here, measured(TWO, here, compute=2.0, besides=5.0), 100_000)
    away = replace(there, seen=taught.seen)
    assert of(TWO, away).terms["wire"] == of(TWO, there).terms["wire"]
    assert of(TWO, away).terms["compute"] > 1.9 * of(TWO, there).terms["compute"]


def test_a_trainer_that_does_not_tell_its_computing_teaches_the_rest() -> None:
    on = ground()
    said = measured(TWO, on, besides=1.0)
    said["exchange"] += said.pop("compute")
    taught = of(TWO, after(TWO, on, said, 100_000))
    assert taught.seconds == pytest.approx(of(TWO, on).seconds, rel=0.01)


def test_an_accident_is_bounded() -> None:
    on = ground()
    seen = after(TWO, on, measured(TWO, on, compute=1e9), 10**6).seen
    assert max(factor.times for factor in seen.values()) <= 50


def test_what_was_seen_can_be_kept() -> None:
    seen = {"data/": Factor(2.0, 30.0)}
    assert msgspec.json.decode(msgspec.json.encode(seen), type=dict[str, Factor]) == seen


def test_nothing_seen_is_nothing_changed() -> None:
    on = ground()
    prediction = of(TWO, on)
    assert corrected(prediction, on) is prediction


def test_plans_that_compute_alike_and_took_unlike_long_are_told_apart() -> None:
    on, other = ground(), msgspec.structs.replace(TWO, zero=1)
    slow, fast = measured(TWO, on, compute=2.0), measured(other, on, compute=1.2)
    for runs in ([(TWO, slow, 1e5), (other, fast, 1e5)], [(other, fast, 1e5), (TWO, slow, 1e5)]):
        known = taught(on, runs)
        assert of(TWO, known).seconds == pytest.approx(slow["step"], rel=0.01)
        assert of(other, known).seconds == pytest.approx(fast["step"], rel=0.01)


def test_a_few_own_steps_leave_what_is_believed_as_it_is() -> None:
    on, other = ground(), msgspec.structs.replace(TWO, zero=1)
    taught = after(other, on, measured(other, on, compute=2.0, besides=2.0), 1e5)
    believed = of(TWO, taught).seconds
    once = after(TWO, taught, measured(TWO, on, compute=2.0, besides=2.0), 3)
    assert of(TWO, once).seconds == pytest.approx(believed, rel=0.1)
