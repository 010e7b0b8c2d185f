"""Properties of the order in which stages work, for every schedule and number of stages, chunks and microbatches."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tricorn.mp.schedule import Parcel, arrivals, choose_microbatches, gathered, needed, order, split, target
from tricorn.mp.simulate import Work, crowded, most_in_flight, simulate

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero-bubble")
UNIT = Work(1.0, 1.0, 1.0)


@st.composite
def pipelines(draw):
    """The orders of all workers, and what they were made from."""
    schedule, stages = draw(st.sampled_from(SCHEDULES)), draw(st.integers(1, 8))
    chunks = draw(st.integers(1, 4)) if schedule == "interleaved" and stages > 1 else 1
    microbatches = draw(st.integers(1, 24))
    orders = [order(schedule, rank, stages, microbatches, chunks) for rank in range(stages)]
    return schedule, orders, chunks, microbatches


@given(pipelines())
def test_every_microbatch_goes_forward_and_then_backward_once_through_every_stage(pipeline):
    _, orders, chunks, microbatches = pipeline
    everything = {(chunk, i) for chunk in range(chunks) for i in range(microbatches)}
    for actions in orders:
        assert len(set(actions)) == len(actions)
        found = {kind: {action[1:] for action in actions if action.kind == kind} for kind in "FBIW"}
        assert found["F"] == everything == found["B"] | found["I"]
        assert not found["B"] & found["I"]
        assert found["I"] == found["W"]
        at = {action: place for place, action in enumerate(actions)}
        for action, place in at.items():
            earlier = {"F": "", "B": "F", "I": "F", "W": "I"}[action.kind]
            assert not earlier or at[action._replace(kind=earlier)] < place


def carry_out(orders, chunks: int, room: int) -> None:
    """Worker after worker does what it can, over channels that hold ``room`` parcels and are read in order.

    What does not fit waits with its sender, which works on; who needs a parcel takes what comes until it is that.
    """
    stages = len(orders)
    todo = [deque(actions) for actions in orders]
    expected = [{peer: deque(parcels) for peer, parcels in arrivals(orders, r, chunks).items()} for r in range(stages)]
    outbox = {(r, peer): deque() for r in range(stages) for peer in range(stages)}
    channel = {(r, peer): deque() for r in range(stages) for peer in range(stages)}
    kept: list[set[Parcel]] = [set() for _ in range(stages)]

    def move() -> None:
        for way, waiting in outbox.items():
            while waiting and len(channel[way]) < room:
                channel[way].append(waiting.popleft())

    def has(rank: int, parcel: Parcel) -> bool:
        peer = next((peer for peer, parcels in expected[rank].items() if parcel in parcels), rank)
        while parcel not in kept[rank] and channel[peer, rank]:
            taken = channel[peer, rank].popleft()
            assert taken == expected[rank][peer].popleft()
            kept[rank].add(taken)
            move()
        return parcel in kept[rank]

    moved = True
    while moved:
        moved = False
        for rank in range(stages):
            while todo[rank]:
                parcel = needed(todo[rank][0], rank, stages, chunks)
                if parcel is not None and not has(rank, parcel):
                    break
                kept[rank].discard(parcel)
                sent = target(todo[rank].popleft(), rank, stages, chunks)
                if sent is not None:
                    outbox[rank, sent.stage % stages].append(sent)
                move()
                moved = True
    assert not any(todo)
    assert not any(kept)
    assert not any(channel.values())


@given(pipelines(), st.integers(1, 3))
def test_no_worker_waits_for_ever_however_little_fits_into_a_channel(pipeline, room):
    _, orders, chunks, _ = pipeline
    carry_out(orders, chunks, room)


@given(pipelines())
def test_forwards_alone_can_be_carried_out_too(pipeline):
    _, orders, chunks, _ = pipeline
    carry_out([[action for action in actions if action.kind == "F"] for actions in orders], chunks, 1)


@given(pipelines())
def test_no_more_microbatches_are_in_flight_than_the_schedule_promises(pipeline):
    schedule, orders, chunks, microbatches = pipeline
    stages = len(orders)
    group = -(-microbatches // max(1, microbatches // stages))
    for rank, actions in enumerate(orders):
        most = {
            "gpipe": microbatches,
            "1f1b": min(stages - rank, microbatches),
            "interleaved": 2 * (stages - 1 - rank) + (chunks - 1) * group + 1,
            "zero-bubble": min(stages, microbatches),
        }[schedule]
        assert most_in_flight(actions) <= most


@given(pipelines())
def test_idle_time_is_what_the_papers_say(pipeline):
    """(p - 1) (F + I + W) for GPipe, (F + I) / v where the last gradients are hurried, F + I - W for ZB-H1."""
    schedule, orders, chunks, microbatches = pipeline
    stages = len(orders)
    if microbatches < stages or (chunks > 1 and microbatches % stages):
        return
    bubble = {"gpipe": 3.0, "1f1b": 2.0, "interleaved": 2 / chunks, "zero-bubble": 1.0}[schedule]
    made = simulate(orders, [Work(1 / chunks, 1 / chunks, 1 / chunks)] * (stages * chunks))
    assert made.seconds == pytest.approx(3 * microbatches + (stages - 1) * bubble)
    assert made.idle == pytest.approx(1 - 3 * microbatches / made.seconds)


@given(pipelines(), st.lists(st.floats(0.001, 1), min_size=32, max_size=32), st.floats(0, 0.5))
def test_no_step_is_shorter_than_its_slowest_stage_or_than_one_microbatch_takes(pipeline, seconds, hop):
    _, orders, chunks, microbatches = pipeline
    works = [Work(f, f / 2, f / 3) for f in seconds[: len(orders) * chunks]]
    made = simulate(orders, works, hop)
    slowest = max(
        microbatches * sum(sum(works[r + c * len(orders)]) for c in range(chunks)) for r in range(len(orders))
    )
    through = sum(work.forward + work.input_gradient for work in works) + 2 * (len(works) - 1) * hop
    assert made.seconds >= max(slowest, through) - 1e-9
    assert 0 <= made.idle < 1


def test_workers_that_wait_for_each_other_are_found():
    orders = [order("1f1b", rank, 2, 2) for rank in range(2)]
    with pytest.raises(ValueError, match="wait for each other"):
        simulate([orders[0][::-1], orders[1]], [UNIT, UNIT])


@given(pipelines(), st.lists(st.floats(0.001, 1), min_size=32, max_size=32))
def test_fewer_cores_than_workers_are_never_idle_for_less_or_work_faster(pipeline, seconds):
    _, orders, chunks, _ = pipeline
    works = [Work(f, f / 2, f / 3) for f in seconds[: len(orders) * chunks]]
    enough = simulate(orders, works).seconds
    assert crowded(orders, works, len(orders)) == pytest.approx(enough)
    alone = sum(works[a.chunk * len(orders) + r].of(a.kind) for r, actions in enumerate(orders) for a in actions)
    assert crowded(orders, works, 1) == pytest.approx(alone)
    assert max(enough, alone / 2) - 1e-9 <= crowded(orders, works, 2) <= alone + 1e-9


@given(pipelines(), st.integers(1, 30), st.lists(st.floats(0.001, 1), min_size=32, max_size=32))
def test_weight_gradients_that_are_put_together_are_the_same_work_in_an_order_that_can_be_carried_out(
    pipeline, together, seconds
):
    _, orders, chunks, _ = pipeline
    works = [Work(f, f / 2, f / 3) for f in seconds[: len(orders) * chunks]]
    later = [gathered(actions, [together] * chunks) for actions in orders]
    for rank, (actions, those) in enumerate(zip(orders, later, strict=True)):
        before, after = (sum(works[a.chunk * len(orders) + rank].of(a.kind) for a in each) for each in (actions, those))
        assert after == pytest.approx(before)
        assert together > 1 or those == actions
    assert simulate(later, works).seconds > 0


def test_weight_gradients_wait_for_as_many_as_are_put_together_or_for_the_end():
    def written(together):
        actions = gathered(order("1f1b", 1, 2, 5), [together])
        return " ".join(action.kind for action in actions)

    assert written(1) == "F B F B F B F I W F I W"
    assert written(2) == "F I F W B F I F I W W F I W"
    assert written(9) == "F I F I F I F I F I W W W W W"


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
