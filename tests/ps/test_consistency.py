from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tricorn.errors import ProtocolError
from tricorn.ps.consistency import Bsp, Clocks, Verdict, histogram

events = st.lists(st.tuples(st.sampled_from(["read", "push", "idle", "leave"]), st.integers(0, 3)), max_size=80)


@given(st.integers(0, 4), events)
def test_whoever_reads_is_at_most_that_far_ahead_of_all_who_work(staleness: int, events: list[tuple[str, int]]) -> None:
    clocks = Clocks()
    for event, worker in events:
        if event == "read":
            clocks.wake(worker)
            own, working = clocks.clocks[worker], [clocks.clocks[peer] for peer in clocks.working]
            assert clocks.may_read(worker, staleness) == all(clock >= own - staleness for clock in working)
        elif event == "push":
            clocks.push(worker)
        elif event == "idle":
            clocks.idle(worker)
        else:
            clocks.leave(worker)
        # Nobody waits for ever: the slowest of those who work may always read.
        if clocks.working:
            assert clocks.may_read(min(clocks.working, key=lambda peer: clocks.clocks[peer]), staleness)


@given(st.integers(1, 3), st.integers(0, 2), st.data())
def test_no_interleaving_of_reading_and_pushing_workers_breaks_the_bound(
    workers: int, staleness: int, data: st.DataObject
) -> None:
    """Each worker reads, then pushes, in turn; who is next is arbitrary, and a reader that may not is asked again."""
    clocks = Clocks()
    pushes = [0] * workers
    has_read = [False] * workers
    for worker in range(workers):
        clocks.wake(worker)
    for worker in data.draw(st.lists(st.integers(0, workers - 1), max_size=60)):
        if has_read[worker]:
            clocks.push(worker)
            pushes[worker] += 1
            has_read[worker] = False
        elif clocks.may_read(worker, staleness):
            assert pushes[worker] - min(pushes) <= staleness
            has_read[worker] = True


def test_ages_are_told_one_by_one_as_long_as_they_are_small() -> None:
    ages = {0: 7, 3: 1, 15: 2, 16: 4, 31: 5, 32: 1, 1000: 9}
    assert histogram(ages) == {"0": 7, "3": 1, "15": 2, "16-31": 9, "32-63": 1, "512-1023": 9}
    assert len(histogram(dict.fromkeys(range(1 << 16), 1))) < 40


def test_without_bound_all_read() -> None:
    clocks = Clocks()
    clocks.wake(1)
    for _ in range(9):
        clocks.push(0)
    assert clocks.may_read(0, None)


def test_whoever_comes_late_begins_where_the_slowest_is() -> None:
    clocks = Clocks()
    for _ in range(5):
        clocks.push(0)
    for _ in range(3):
        clocks.push(1)
    clocks.wake(2)
    assert clocks.clocks == {0: 5, 1: 8, 2: 5}


@given(st.integers(1, 4), st.data())
def test_each_slot_counts_once_in_each_step(workers: int, data: st.DataObject) -> None:
    bsp = Bsp(workers, 7)
    taken: dict[int, set[int]] = {}
    for step, slot, pulls in data.draw(
        st.lists(st.tuples(st.integers(5, 12), st.integers(0, workers - 1), st.booleans()), max_size=80)
    ):
        version = bsp.version
        if pulls:
            if step == version or (step == version + 1 and bsp.complete):
                if bsp.pull(step):
                    assert step == version + 1
                    bsp.advance()
                assert bsp.version == step
            else:
                with pytest.raises(ProtocolError):
                    bsp.pull(step)
            continue
        if step not in (version - 1, version):
            with pytest.raises(ProtocolError):
                bsp.judge(step, slot)
            continue
        verdict = bsp.judge(step, slot)
        if verdict is Verdict.TAKE:
            assert slot not in taken.setdefault(step, set())
            taken[step].add(slot)
            assert bsp.contribute(step, slot) == (len(taken[step]) == workers)
        else:
            assert verdict is (Verdict.REPEAT if step < version or bsp.complete else Verdict.WAIT)
        assert bsp.steps() == ([version, version + 1] if len(taken.get(version, ())) == workers else [version])


def test_going_on_keeps_only_the_sum_that_leads_there() -> None:
    bsp = Bsp(2, 3)
    bsp.contribute(3, 0)
    bsp.begin(3, 1)
    assert bsp.judge(3, 0) is Verdict.TAKE
    assert bsp.contribute(3, 0)
    bsp.begin(4, 5)
    assert bsp.pull(4)
    bsp.advance()
    with pytest.raises(ProtocolError, match=r"holds the steps \[4\], not 5"):
        bsp.begin(5, 1)
