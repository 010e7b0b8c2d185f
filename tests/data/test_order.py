"""The order of samples: a bijection that any role computes alike, and the steps an epoch is cut into."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tricorn.data.order import Permutation, step_range, steps_per_epoch

SEEDS = st.integers(0, 2**40)
LARGE = st.integers(10**6, 2**62 - 1)


@given(seed=SEEDS, epoch=st.integers(0, 1000), size=st.integers(1, 5000))
def test_every_sample_comes_once(seed: int, epoch: int, size: int) -> None:
    permutation = Permutation(seed, epoch, "data", size)
    ids = permutation.ids(0, size)
    assert ids.dtype == np.int64
    assert np.array_equal(np.sort(ids), np.arange(size))
    assert np.array_equal(permutation.position(ids), np.arange(size))


@given(seed=SEEDS, size=LARGE, data=st.data())
def test_large_sizes_stay_in_range_and_invert(seed: int, size: int, data: st.DataObject) -> None:
    positions = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=50, unique=True)))
    permutation = Permutation(seed, 0, "data", size)
    ids = permutation.at(positions)
    assert ((ids >= 0) & (ids < size)).all()
    assert len(np.unique(ids)) == len(positions)
    assert np.array_equal(permutation.position(ids), positions)


@given(size=st.integers(1, 3000), cuts=st.lists(st.integers(0, 3000), max_size=6))
def test_any_part_is_computed_alone(size: int, cuts: list[int]) -> None:
    whole = Permutation(7, 3, "data", size).ids(0, size)
    edges = [0, *sorted(min(cut, size) for cut in cuts), size]
    parts = [Permutation(7, 3, "data", size).ids(low, high) for low, high in pairwise(edges)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_the_order_never_changes_between_versions() -> None:
    """A run is resumed by whatever version is installed then: these numbers are part of the format."""
    assert Permutation(0, 0, "data", 10).ids(0, 10).tolist() == [9, 4, 0, 2, 8, 1, 5, 7, 6, 3]
    assert Permutation(1, 2, "data", 10**12).ids(5, 8).tolist() == [918117339577, 630217343083, 265528529990]


@pytest.mark.parametrize("other", [(1, 0, "data"), (0, 1, "data"), (0, 0, "other data")])
def test_seed_epoch_and_data_each_change_the_order(other: tuple[int, int, str]) -> None:
    first, second = Permutation(0, 0, "data", 1000).ids(0, 1000), Permutation(*other, 1000).ids(0, 1000)
    assert (first == second).sum() < 10  # two random orders agree in one place on average


def test_positions_and_samples_are_independent() -> None:
    """Chi-square over a table of (tenth of the order, tenth of the samples), for 200 epochs together."""
    cells, size, epochs = 10, 1000, 200
    counts = np.zeros((cells, cells))
    for epoch in range(epochs):
        ids = Permutation(0, epoch, "data", size).ids(0, size)
        np.add.at(counts, (np.arange(size) * cells // size, ids * cells // size), 1)
    expected = size * epochs / cells**2
    # Without replacement the variance is (1 - 1/cells)^2 of the independent one; 81 degrees of freedom.
    statistic = ((counts - expected) ** 2 / expected).sum() * (size - 1) / size
    assert 42 < statistic < 140  # one in ten thousand on either side


def test_neighbours_are_not_kept_together() -> None:
    size = 10_000
    ids = Permutation(0, 0, "data", size).ids(0, size)
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.04  # four standard deviations


def test_every_order_of_four_is_reached_about_equally() -> None:
    orders = 24
    seen: dict[tuple[int, ...], int] = {}
    for seed in range(4800):
        order = tuple(Permutation(seed, 0, "data", 4).ids(0, 4).tolist())
        seen[order] = seen.get(order, 0) + 1
    assert len(seen) == orders
    assert sum((count - 200) ** 2 / 200 for count in seen.values()) < 60  # 23 degrees of freedom: 1 in 40,000


@pytest.mark.parametrize("size", [0, -1, 2**62])
def test_impossible_sizes_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="a permutation of"):
        Permutation(0, 0, "data", size)


@pytest.mark.parametrize("position", [-1, 10])
def test_positions_outside_are_refused(position: int) -> None:
    with pytest.raises(IndexError, match="of a permutation of 10"):
        Permutation(0, 0, "data", 10).at(position)


@given(size=st.integers(1, 500), batch_size=st.integers(1, 600), epochs=st.integers(1, 3))
def test_steps_tile_each_epoch_and_never_cross_it(size: int, batch_size: int, epochs: int) -> None:
    ranges = [step_range(step, size, batch_size) for step in range(epochs * steps_per_epoch(size, batch_size))]
    covered = [(epoch, position) for epoch, start, stop in ranges for position in range(start, stop)]
    assert covered == [(epoch, position) for epoch in range(epochs) for position in range(size)]
    assert all(0 < stop - start <= batch_size for _, start, stop in ranges)
    assert all(stop - start == batch_size for _, start, stop in ranges if stop < size)
