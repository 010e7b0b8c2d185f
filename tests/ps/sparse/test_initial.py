"""The first values of rows: golden numbers, and that they are normal and independent."""

from __future__ import annotations

import numpy as np

from tricorn.ps.sparse.initial import initial_rows

IDS = np.array([0, 1, -1, 2**63 - 1, -(2**63)])
GOLDEN = [
    [-0.009824730351701685, -1.7352600244039154, -1.2924221263745586],
    [0.12412631255442765, -0.3199224836914937, -1.1149663266020238],
    [-0.5252142513806967, -0.23067091384550642, 2.451193996033479],
    [-2.104409186679291, 0.8794388527955969, 0.45973404127226086],
    [-1.8290170779366905, 0.060335448264813095, 0.7074922074154748],
]


def test_the_numbers_are_these_for_ever() -> None:
    """Runs of other versions, and checkpoints without rows that nobody touched, rely on them."""
    np.testing.assert_allclose(initial_rows(0, "emb", IDS, 1.0, 3, "float64"), GOLDEN, rtol=1e-14)


def test_float32_is_float64_rounded_and_a_row_does_not_depend_on_its_length_nor_on_the_others() -> None:
    whole = initial_rows(3, "emb", IDS, 0.01, 16, "float64")
    assert np.array_equal(initial_rows(3, "emb", IDS, 0.01, 16, "float32"), whole.astype(np.float32))
    assert np.array_equal(initial_rows(3, "emb", IDS, 0.01, 7, "float64"), whole[:, :7])
    assert np.array_equal(initial_rows(3, "emb", IDS[2:3], 0.01, 16, "float64"), whole[2:3])


def test_seeds_names_and_ids_have_numbers_of_their_own() -> None:
    ids = np.arange(1000)
    rows = [initial_rows(seed, name, ids, 1.0, 8, "float64") for seed, name in ((0, "a"), (1, "a"), (0, "b"))]
    assert len(np.unique(np.concatenate(rows))) == 3 * 8 * 1000


def test_the_numbers_are_normal_and_independent() -> None:
    n = 100_000
    rows = initial_rows(0, "emb", np.arange(n), 2.0, 4, "float64") / 2.0
    moments = [(rows**power).mean() for power in (1, 2, 3, 4)]
    np.testing.assert_allclose(moments, [0, 1, 0, 3], atol=0.05)
    np.testing.assert_allclose(np.corrcoef(rows.T), np.eye(4), atol=0.02)  # of elements
    assert abs((rows[1:] * rows[:-1]).mean()) < 0.01  # of neighbouring ids
    assert abs(np.mean(np.abs(rows) < 0.6744897501960817) - 0.5) < 0.005


def test_a_deviation_of_zero() -> None:
    assert not initial_rows(0, "emb", IDS, 0.0, 3, "float32").any()
