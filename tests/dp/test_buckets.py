"""How a layout is cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tricorn.dp.buckets import BUCKET_BYTES, FIRST_PART, ROUNDS, Bucket, Trial, cut
from tricorn.state.flat import layout

FIRST_BYTES = BUCKET_BYTES // FIRST_PART


def test_from_the_end_and_the_first_is_small():
    quarter = FIRST_BYTES // 4
    entries = layout([("a", [8 * quarter]), ("b", [3 * quarter]), ("c", [quarter // 2]), ("d", [quarter // 2])])
    assert cut(entries, 4, BUCKET_BYTES) == [
        Bucket(11 * quarter, 12 * quarter, (3, 2)),
        Bucket(0, 11 * quarter, (1, 0)),
    ]


def test_nothing_to_train():
    assert cut((), 4, BUCKET_BYTES) == []


@given(st.lists(st.integers(0, 400_000), max_size=30))
def test_every_element_is_in_one_bucket_and_none_is_larger_than_it_must_be(lengths):
    entries = layout((str(n), [length]) for n, length in enumerate(lengths))
    made = cut(entries, 4, BUCKET_BYTES)
    assert [n for bucket in made for n in bucket.parameters] == [*reversed(range(len(entries)))]
    edges = [edge for bucket in made for edge in (bucket.stop, bucket.start)]
    assert edges == sorted(edges, reverse=True)
    assert sum(bucket.stop - bucket.start for bucket in made) == sum(lengths)
    for place, bucket in enumerate(made):
        without_last = bucket.stop - bucket.start - lengths[bucket.parameters[-1]]
        assert 4 * without_last < (BUCKET_BYTES if place else FIRST_BYTES)


def test_the_size_with_the_shortest_steps_stays():
    trial = Trial([1, 2, 4])
    used = [trial.next()]
    for _ in range(3 * ROUNDS):
        assert trial.best() is None
        used.append(trial.next())
        trial.observe({1: 3.0, 2: 1.0, 4: 2.0}[used[-2]] if len(used) != 3 else 99.0)  # one step of size 2 is held up
    assert used[:6] == [1, 2, 4, 1, 2, 4]
    assert trial.best() == 2
