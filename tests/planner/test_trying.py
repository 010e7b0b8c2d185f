"""Plans are tried, the best first, until nothing that was not tried comes near the best that was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tricorn.errors import RoleFailed
from tricorn.plan import Plan
from tricorn.planner.correct import way
from tricorn.planner.ground import Ground
from tricorn.planner.search import Planning, exact, predicted, search
from tricorn.planner.trying import CLOSE, IN_VAIN, RIVAL, ROUNDS, SECONDS, Trial, Tried, try_out

from .world import ground

GIVEN = {"threads": 1}


def able(plans: Sequence[Plan]) -> list[str | None]:
    return [None] * len(plans)


def seconds_of(plan: Plan, on: Ground) -> float:
    found = predicted(plan, on)
    assert not isinstance(found, str)
    return found.seconds


class Machine:
    """Takes ``slow`` times as long for some strategies as is predicted; each trial lasts so many seconds."""

    def __init__(self, on: Ground, slow: Mapping[str, float], lasting: float = 1.0) -> None:
        self.on, self.slow, self.lasting = on, slow, lasting
        self.tried: list[Plan] = []
        self.clock = 0.0

    def __call__(self, plan: Plan) -> Tried:
        self.tried.append(plan)
        self.clock += self.lasting
        step = self.truth(plan)
        return Tried({"step": step, "data": 0.0, "compute": step / 2, "exchange": step / 2}, 30.0)

    def truth(self, plan: Plan) -> float:
        return seconds_of(plan, self.on) * self.slow.get(plan.strategy, 1.0)


def plan(on: Ground, trial: Trial, machine: Machine, *, approximate: bool = False) -> Planning:
    found, _ = try_out(
        on, able, GIVEN, approximate=approximate, trial=trial, told=lambda text: None, now=lambda: machine.clock
    )
    return found


def test_what_seemed_best_is_left_when_it_turns_out_to_be_slow() -> None:
    on = ground()
    untried = search(on, able, GIVEN, approximate=False).chosen
    assert untried is not None
    machine = Machine(on, {untried.plan.strategy: 4.0})
    found = plan(on, machine, machine)
    assert machine.tried[0] == untried.plan
    assert found.chosen is not None
    assert found.chosen.plan.strategy != untried.plan.strategy
    assert found.chosen.plan in found.tried
    assert machine.truth(found.chosen.plan) <= 1.1 * min(map(machine.truth, machine.tried))


def test_every_plan_that_seems_nearly_as_good_is_tried_and_one_of_each_way() -> None:
    on = ground()
    machine = Machine(on, {})
    found = plan(on, machine, machine)
    assert found.chosen is not None
    near = [each.plan for each in found.ranked if each.score <= RIVAL * found.chosen.score]
    assert {one for one in near if one.synchronous and one.local_steps == 1} <= set(found.tried)
    assert {way(one) for one in found.tried} == {way(each.plan) for each in found.ranked if exact(each.plan)}
    assert len(found.tried) < len(found.ranked)
    assert all(exact(one) for one in found.tried)
    close = {each.plan for each in found.ranked if each.score <= CLOSE * found.chosen.score} & set(found.tried)
    assert all(machine.tried.count(one) == ROUNDS for one in close)
    assert max(map(machine.tried.count, machine.tried)) <= ROUNDS


def test_a_trial_that_was_disturbed_is_made_again_where_it_matters() -> None:
    on = ground()
    machine = Machine(on, {})
    best = plan(on, machine, machine).chosen
    assert best is not None

    def disturbed(one: Plan) -> Tried:
        found, before = machine(one), machine.tried.count(one)
        slow = 1.08 if (one, before) == (best.plan, 1) else 1.0
        return found._replace(measured={term: slow * seconds for term, seconds in found.measured.items()})

    machine.tried.clear()
    again = plan(on, disturbed, machine)
    assert again.chosen is not None
    assert machine.tried.count(best.plan) == ROUNDS
    assert machine.truth(again.chosen.plan) <= 1.05 * machine.truth(best.plan)


def test_a_trial_that_was_lucky_is_not_believed() -> None:
    on = ground()
    machine = Machine(on, {})
    second = next(each.plan for each in search(on, able, GIVEN, approximate=False).ranked[1:] if exact(each.plan))

    def lucky(one: Plan) -> Tried:
        found, before = machine(one), machine.tried.count(one)
        fast = 0.4 if (one, before) == (second, 1) else 1.0
        return found._replace(measured={term: fast * seconds for term, seconds in found.measured.items()})

    found = plan(on, lucky, machine)
    assert found.chosen is not None
    assert machine.tried.count(second) > 1
    assert machine.truth(found.chosen.plan) <= CLOSE * min(map(machine.truth, machine.tried))


def test_asynchronous_plans_are_tried_if_they_are_allowed() -> None:
    on = ground()
    machine = Machine(on, {"dp": 8.0, "mp": 8.0})
    plan(on, machine, machine, approximate=True)
    assert any(not one.synchronous for one in machine.tried)


def test_a_plan_that_fails_is_out_of_the_question() -> None:
    on = ground()
    machine = Machine(on, {})

    def fails(one: Plan) -> Tried:
        if one.strategy == "dp":
            raise RoleFailed("worker-0 was killed")
        return machine(one)

    found = plan(on, fails, machine)
    assert found.chosen is not None
    assert found.chosen.plan.strategy != "dp"
    assert any("it was tried, and failed: worker-0 was killed" in each.reason for each in found.rejected)
    assert not any(one.strategy == "dp" for one in found.tried)


def test_a_job_of_too_few_steps_is_not_tried_on_and_on() -> None:
    machine = Machine(ground(), {})

    def too_few(one: Plan) -> Tried:
        return machine(one)._replace(steps=2.0)

    found = plan(machine.on, too_few, machine)
    assert len(machine.tried) == IN_VAIN
    assert not found.tried
    assert found.chosen == search(machine.on, able, GIVEN, approximate=False).chosen


def test_trials_end_with_their_time() -> None:
    machine = Machine(ground(), {}, lasting=SECONDS + 1)
    assert plan(machine.on, machine, machine).tried == (machine.tried[0],)
