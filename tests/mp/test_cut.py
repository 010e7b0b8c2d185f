"""The exact cut of a chain of blocks."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tricorn.errors import PlanError
from tricorn.mp.cut import FREE, Link, balanced

numbers = st.integers(0, 20)


def slowest(seconds, slowness, cuts, handed_on, link):
    """What the slowest stage computes and copies, or waits for its links."""
    found, last = [], len(seconds)
    for stage, (start, stop) in enumerate(itertools.pairwise((0, *cuts, last))):
        given, made = handed_on[start - 1] if start else 0, handed_on[stop - 1] if stop < last else 0
        busy = sum(seconds[start:stop]) + link.copy * (given + made)
        found.append(max(slowness[stage] * busy, link.wire * given, link.wire * made))
    return max(found)


@given(st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=8), st.data())
def test_balanced_is_as_good_as_trying_everything(blocks, data):
    seconds, handed_on, sizes = (list(column) for column in zip(*blocks, strict=True))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(len(blocks) - 1, 1)))) & set(range(1, len(blocks))))
    stages = data.draw(st.integers(1, len(cuts) + 1))
    link = data.draw(st.sampled_from([FREE, Link(1, 0), Link(0, 1), Link(0.5, 2)]))
    rooms = data.draw(st.lists(st.integers(0, 80), min_size=stages, max_size=stages))
    slowness = data.draw(st.lists(st.sampled_from([1, 2, 4]), min_size=stages, max_size=stages))

    def fits(stage, start, stop):
        return sum(sizes[start:stop]) <= rooms[stage]

    possible = [
        chosen
        for chosen in itertools.combinations(cuts, stages - 1)
        if all(fits(s, a, b) for s, (a, b) in enumerate(itertools.pairwise((0, *chosen, len(blocks)))))
    ]
    best = sorted(slowest(seconds, slowness, chosen, handed_on, link) for chosen in possible)
    found = balanced(seconds, slowness, cuts, handed_on, link, fits, keep=3)
    assert set(found) <= set(possible)
    assert [slowest(seconds, slowness, chosen, handed_on, link) for chosen in found] == best[:3]


@pytest.mark.parametrize(
    ("slowness", "link", "best"),
    [
        ([1, 1], FREE, (2,)),
        ([1, 4], FREE, (3,)),  # a worker at a quarter of the speed gets a fifth of the work
        ([4, 1], FREE, (1,)),
        ([1, 1], Link(0, 2), (1,)),  # few bytes cross here
    ],
)
def test_what_decides(slowness, link, best):
    assert balanced([1.0, 1.0, 1.0, 1.0], slowness, [1, 2, 3], [1, 3, 2, 9], link) == [best]


def test_more_stages_than_there_are_cuts_are_refused():
    with pytest.raises(PlanError, match="can be cut into 2 stages cannot make 3"):
        balanced([1.0, 1.0, 1.0], [1, 1, 1], [2], [0, 0, 0])
