from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tricorn.ps.placement import BUCKET, buckets, place
from tricorn.state.flat import layout

shapes = st.lists(st.lists(st.integers(0, 700), max_size=2), max_size=30)


def entries_of(shapes: list[list[int]]):
    return layout((f"table{i}", shape) for i, shape in enumerate(shapes))


@given(shapes)
def test_buckets_cut_each_table_and_nothing_else(shapes: list[list[int]]) -> None:
    entries = entries_of(shapes)
    cut = buckets(entries)
    assert all(0 < bucket.stop - bucket.start <= BUCKET for bucket in cut)
    for entry in entries:
        own = [bucket for bucket in cut if bucket.table == entry.name]
        assert [i for b in own for i in (b.start, b.stop)] == sorted(i for b in own for i in (b.start, b.stop))
        assert sum(bucket.stop - bucket.start for bucket in own) == entry.stop - entry.start
    assert sum(bucket.stop - bucket.start for bucket in cut) == (entries[-1].stop if entries else 0)


@given(shapes, st.integers(1, 9))
def test_servers_share_all_elements_in_balance(shapes: list[list[int]], servers: int) -> None:
    entries = entries_of(shapes)
    total = entries[-1].stop if entries else 0
    slices = place(entries, servers)
    assert len(slices) == servers
    assert slices[0][0] == 0
    assert slices[-1][1] == total
    assert all(left[1] == right[0] for left, right in pairwise(slices))
    edges = {0, *(bucket.stop for bucket in buckets(entries))}
    assert {edge for cut in slices for edge in cut} <= edges
    assert all(abs((stop - start) - total / servers) <= BUCKET for start, stop in slices)
