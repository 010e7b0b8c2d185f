"""The exact cut of a chain of blocks."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tricorn.errors import PlanError
from tricorn.mp.cut import FREE, Link, balance, slowest

numbers = st.integers(0, 20)


@given(st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=8), st.data())
def test_balance_is_as_good_as_trying_everything(blocks, data):
    seconds, handed_on, sizes = (list(column) for column in zip(*blocks, strict=True))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(len(blocks) - 1, 1)))) & set(range(1, len(blocks))))
    stages = data.draw(st.integers(1, len(cuts) + 1))
    link = data.draw(st.sampled_from([FREE, Link(1, 0), Link(0, 1), Link(0.5, 2)]))
    rooms = data.draw(st.lists(st.integers(0, 80), min_size=stages, max_size=stages))

    def fits(stage, start, stop):
        return sum(sizes[start:stop]) <= rooms[stage]

    possible = [
        chosen
        for chosen in itertools.combinations(cuts, stages - 1)
        if all(fits(s, a, b) for s, (a, b) in enumerate(itertools.pairwise((0, *chosen, len(blocks)))))
    ]
    found = balance(seconds, stages, cuts, handed_on, link, fits)
    if not possible:
        assert found is None
    else:
        assert found in possible
        best = min(slowest(seconds, chosen, handed_on, link) for chosen in possible)
        assert slowest(seconds, found, handed_on, link) == best


def test_the_slowest_stage_computes_and_copies_and_waits_for_its_links():
    seconds, handed_on = [5.0, 1.0, 6.0], [4, 2, 9]
    assert slowest(seconds, (1,), handed_on, FREE) == 7.0
    assert slowest(seconds, (1,), handed_on, Link(0.5, 0)) == 9.0
    assert slowest(seconds, (1,), handed_on, Link(0, 3)) == 12.0  # 4 bytes at 3 seconds each pass meanwhile
    assert slowest(seconds, (1, 2), handed_on, Link(0.5, 0)) == 7.0  # the last hands on nothing
    assert balance(seconds, 2, [1, 2], handed_on, Link(1, 0)) == (2,)


def test_balance_refuses_more_stages_than_there_are_cuts():
    with pytest.raises(PlanError, match="can be cut into 2 stages cannot make 3"):
        balance([1.0, 1.0, 1.0], 3, [2])
