"""Intervals against a plain set."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tricorn.control.intervals import Intervals

ranges = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=12)


def plain(pairs) -> set[int]:
    return {number for start, stop in pairs for number in range(start, stop)}


@given(ranges, st.lists(st.integers(0, 60), max_size=20))
def test_it_is_the_set_of_what_was_added(pairs, numbers):
    found, expected = Intervals(pairs), plain(pairs)
    for number in numbers:
        assert found.add(number) == (number not in expected)
        expected.add(number)
    assert plain(found.pairs) == expected
    assert len(found) == len(expected)
    assert {number for number in range(-2, 64) if number in found} == expected


@given(ranges)
def test_pairs_are_ordered_disjoint_and_never_adjacent(pairs):
    kept = Intervals(pairs).pairs
    assert all(start < stop for start, stop in kept)
    assert all(stop < start for (_, stop), (start, _) in pairwise(kept))
    assert Intervals(kept).pairs == kept


@given(ranges, st.integers(0, 64), st.integers(0, 64))
def test_gaps(pairs, start, stop):
    found, expected = Intervals(pairs), plain(pairs)
    assert found.first_gap(start) == next(n for n in range(start, 200) if n not in expected)
    assert list(found.missing(start, stop)) == [n for n in range(start, stop) if n not in expected]


@given(ranges, ranges)
def test_common_is_the_intersection(one, other):
    first, second = Intervals(one), Intervals(other)
    both = first.common(second)
    assert plain(both.pairs) == plain(one) & plain(other)
    assert both.pairs == second.common(first).pairs
    assert (plain(first.pairs), plain(second.pairs)) == (plain(one), plain(other))
