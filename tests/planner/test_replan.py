"""When a run says that another plan would be faster: not early, not within the noise, not for little, and once."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from tricorn.plan import Plan
from tricorn.planner.ground import Ground
from tricorn.planner.prediction import Prediction
from tricorn.planner.replan import Outlook, Watch, taught
from tricorn.planner.search import candidates, exact, predicted

from .world import ground, profile

FOUR = Plan(strategy="dp", workers=4)
MANY = 100_000  # steps left


def outlook(plan: Plan = FOUR, *, asked: bool = True) -> Outlook:
    on = ground(profile(batch=0.4))
    prediction = predicted(plan, on)
    assert isinstance(prediction, Prediction)
    return Outlook(prediction, on, approved(on, {}) if asked else {})


def approved(on: Ground, given: dict[str, object]) -> dict[str, str | None]:
    """Every plan that can be predicted can run."""
    found = [predicted(each, on) for each in candidates(on, given)]
    return {msgspec.json.encode(each.plan).decode(): None for each in found if isinstance(each, Prediction)}


def seconds(of: Outlook, slower: float = 0.0) -> dict[str, float]:
    """What a run measures in which exchanging takes so many seconds longer than predicted."""
    terms = of.prediction.terms
    found = {"compute": terms["compute"], "data": terms["data"], "exchange": slower}
    found["exchange"] += of.prediction.seconds - terms["compute"] - terms["data"]
    return {"step": sum(found.values()), **found}


def test_a_run_as_it_was_predicted_goes_on() -> None:
    best = outlook()
    watch = Watch(best)
    assert not any(watch.look(seconds(best), steps, MANY) for steps in (50, 100, 1000, 10_000))


def test_a_plan_that_turns_out_slow_is_left_for_one_that_is_clearly_faster_and_once() -> None:
    best = outlook()
    slow = seconds(best, 0.4)
    watch = Watch(best)
    said = [steps for steps in range(10, 1000, 10) if watch.look(slow, steps, MANY)]
    assert said == [60]  # looked at 40 and found again at 60
    assert watch.better is not None
    assert watch.better.plan != FOUR
    assert exact(watch.better.plan)
    assert watch.better.high < 0.9 * slow["step"]


def test_within_the_noise_nothing_is_said() -> None:
    best = outlook()
    watch = Watch(best)
    assert not any(watch.look(seconds(best, 0.05 * best.prediction.seconds), steps, MANY) for steps in (50, 100, 1000))


def test_what_was_found_once_must_be_found_again() -> None:
    best = outlook()
    watch = Watch(best)
    assert not watch.look(seconds(best, 0.4), 50, MANY)
    assert not watch.look(seconds(best), 100, MANY)
    assert not watch.look(seconds(best, 0.4), 200, MANY)
    assert watch.look(seconds(best, 0.4), 400, MANY)


def test_near_the_end_it_does_not_pay() -> None:
    best = outlook()
    watch = Watch(best)
    assert not any(watch.look(seconds(best, 0.4), steps, 20) for steps in (50, 100, 1000))


def test_a_slow_machine_is_slow_under_every_plan() -> None:
    best = outlook()
    slow = {term: 2 * value for term, value in seconds(best).items()}
    watch = Watch(best)
    assert not any(watch.look(slow, steps, MANY) for steps in (50, 100, 1000))


def test_a_plan_that_was_left_is_not_taken_again_nor_one_that_nobody_asked_about() -> None:
    best = outlook()
    first = Watch(best)
    assert [first.look(seconds(best, 0.4), steps, MANY) for steps in (50, 100)] == [False, True]
    assert first.better is not None
    again = Watch(best, [first.better.plan])
    again.look(seconds(best, 0.4), 50, MANY)
    again.look(seconds(best, 0.4), 100, MANY)
    assert again.better is None or again.better.plan != first.better.plan
    unasked = Watch(outlook(asked=False))
    assert not any(unasked.look(seconds(best, 0.4), steps, MANY) for steps in (50, 100, 1000))


def test_threads_and_memory_stay_as_they_were_given() -> None:
    given = outlook(Plan(strategy="dp", workers=4, threads=1, memory=3 * 10**9), asked=False)
    verdicts = approved(given.ground, {"threads": 1, "memory": 3 * 10**9})
    given = Outlook(given.prediction, given.ground, verdicts)
    watch = Watch(given)
    assert [watch.look(seconds(given, 0.4), steps, MANY) for steps in (50, 100)] == [False, True]
    assert watch.better is not None
    assert (watch.better.plan.threads, watch.better.plan.memory) == (1, 3 * 10**9)


def test_what_was_left_of_rivals_on_a_quieter_machine_is_no_reason_to_leave() -> None:
    best = outlook()
    on = best.ground
    for plan in (FOUR, Plan(strategy="dp", workers=4, zero=1)):
        found = predicted(plan, best.ground)
        assert isinstance(found, Prediction)
        on = taught(on, [(plan, seconds(replace(best, prediction=found)), 2000)])
    slow = {term: 1.5 * value for term, value in seconds(best).items()}
    watch = Watch(replace(best, ground=on))
    assert not any(watch.look(slow, steps, MANY) for steps in (50, 100, 1000, 10_000))


def test_a_pipeline_is_a_rival_too_and_is_left_for_good() -> None:
    best = outlook()
    pipelines = {plan: verdict for plan, verdict in best.verdicts.items() if '"strategy":"mp"' in plan}
    watch = Watch(replace(best, verdicts=pipelines))
    assert [watch.look(seconds(best, 2.0), steps, MANY) for steps in (50, 100)] == [False, True]
    assert watch.better is not None
    assert watch.better.plan.cuts
    left = Watch(replace(best, verdicts=pipelines), [msgspec.structs.replace(watch.better.plan, cuts=None)])
    assert not any(left.look(seconds(best, 2.0), steps, MANY) for steps in (50, 100))
