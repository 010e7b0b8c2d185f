"""Properties of the order in which stages work, for every number of stages and microbatches."""

from __future__ import annotations

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from tricorn.mp.schedule import choose_microbatches, one_forward_one_backward, split

stages_and_microbatches = st.tuples(st.integers(1, 8), st.integers(1, 24))


@given(stages_and_microbatches)
def test_each_stage_runs_every_microbatch_forward_and_then_backward_in_order(case):
    stages, microbatches = case
    for stage in range(stages):
        order = one_forward_one_backward(stage, stages, microbatches)
        for kind in "FB":
            assert [index for action, index in order if action == kind] == list(range(microbatches))
        for index in range(microbatches):
            assert order.index(("F", index)) < order.index(("B", index))


@given(stages_and_microbatches)
def test_at_most_as_many_microbatches_are_in_flight_as_stages_are_left(case):
    stages, microbatches = case
    for stage in range(stages):
        flying = 0
        for action, _ in one_forward_one_backward(stage, stages, microbatches):
            flying += 1 if action == "F" else -1
            assert 0 <= flying <= stages - stage


@given(stages_and_microbatches)
def test_no_stage_waits_for_ever(case):
    stages, microbatches = case
    todo = [deque(one_forward_one_backward(stage, stages, microbatches)) for stage in range(stages)]
    done: set[tuple[str, int, int]] = set()

    def can_run(stage: int, action: str, index: int) -> bool:
        if action == "F":
            return stage == 0 or ("F", index, stage - 1) in done
        return ("F", index, stage) in done and (stage == stages - 1 or ("B", index, stage + 1) in done)

    while any(todo):
        ready = [stage for stage in range(stages) if todo[stage] and can_run(stage, *todo[stage][0])]
        assert ready
        for stage in ready:
            done.add((*todo[stage].popleft(), stage))


@given(st.integers(1, 1000), st.integers(1, 64))
def test_a_split_covers_every_sample_once_in_parts_that_differ_by_at_most_one(samples, microbatches):
    ranges = split(samples, microbatches)
    assert len(ranges) == min(samples, microbatches)
    assert [sample for start, stop in ranges for sample in range(start, stop)] == list(range(samples))
    sizes = [stop - start for start, stop in ranges]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 10_000), st.integers(1, 16))
def test_the_chosen_number_of_microbatches_leaves_some_samples_in_each(samples, stages):
    microbatches = choose_microbatches(samples, stages)
    assert 1 <= microbatches <= samples
    assert stages > 1 or microbatches == 1


def test_the_number_of_microbatches_grows_with_the_stages():
    assert [choose_microbatches(128, stages) for stages in (1, 2, 3, 4)] == [1, 4, 6, 8]
    assert choose_microbatches(3, 4) == 1
