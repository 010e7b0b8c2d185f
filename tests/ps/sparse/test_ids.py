"""Unique ids, their sums and their servers, beside NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tricorn.ps.sparse.ids import bucket_of, split, sum_rows, sum_runs, unique
from tricorn.ps.sparse.spec import BUCKETS

IDS = st.lists(st.integers(-5, 5) | st.integers(-(2**63), 2**63 - 1), max_size=200).map(lambda i: np.array(i, np.int64))


@given(IDS)
def test_unique_ids_come_in_the_order_of_their_first_appearance(ids_N: np.ndarray) -> None:
    ids_U, inverse_N = unique(ids_N)
    assert ids_U.tolist() == list(dict.fromkeys(ids_N.tolist()))
    assert np.array_equal(ids_U[inverse_N], ids_N)


def test_many_ids_that_come_again() -> None:
    ids_N = np.random.default_rng(0).zipf(1.2, 50_000).astype(np.int64)
    ids_U, inverse_N = unique(ids_N)
    assert np.array_equal(np.sort(ids_U), np.unique(ids_N))
    assert np.array_equal(ids_U[inverse_N], ids_N)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_are_added_in_their_order(dtype: type) -> None:
    """So the sum is the same to the last bit wherever it is made."""
    random = np.random.default_rng(1)
    inverse_N = random.integers(0, 9, 1000)
    grads_ND = random.standard_normal((1000, 5)).astype(dtype)
    expected_UD = np.zeros((9, 5), dtype)
    np.add.at(expected_UD, inverse_N, grads_ND)
    out_UD = np.full((9, 5), np.nan, dtype)
    sum_rows(inverse_N, grads_ND, out_UD)
    assert np.array_equal(out_UD, expected_UD)
    wider = np.full((100, 10 * 5 + 3), np.nan, dtype)
    wider[:, :50] = grads_ND.reshape(100, 50)
    sum_runs(inverse_N, wider.reshape(-1), 10, 53, out_UD)
    assert np.array_equal(out_UD, expected_UD)


def test_a_bucket_is_a_function_of_the_id_for_ever() -> None:
    """Checkpoints and servers of other versions rely on these numbers."""
    assert bucket_of(np.array([0, 1, 2, -1, 2**63 - 1, -(2**63)])).tolist() == [0, 1385, 3517, 2893, 1446, 604]


def test_buckets_are_equally_full() -> None:
    counts = np.bincount(bucket_of(np.arange(100 * BUCKETS)), minlength=BUCKETS)
    assert abs(counts - 100).max() < 60  # six standard deviations


@given(IDS, st.lists(st.integers(0, BUCKETS), max_size=4))
def test_ids_are_grouped_by_server_in_their_order(ids_U: np.ndarray, stops: list[int]) -> None:
    stops_S = np.array([*sorted(stops), BUCKETS])
    order_U, ends_S = split(ids_U, stops_S)
    assert sorted(order_U.tolist()) == list(range(len(ids_U)))
    for low, high, start, end in zip([0, *stops_S], stops_S, [0, *ends_S], ends_S, strict=False):
        own = order_U[start:end]
        assert own.tolist() == sorted(own.tolist())
        assert ((low <= bucket_of(ids_U[own])) & (bucket_of(ids_U[own]) < high)).all()
    assert ends_S[-1] == len(ids_U)
