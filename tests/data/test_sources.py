"""Sources: batches of numbered samples, and errors that name the sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from tricorn.data import arrays, as_source
from tricorn.errors import DataError, UsageError

X = np.arange(24, dtype=np.float32).reshape(6, 4)
Y = np.arange(6)
IDS = np.array([4, 0, 4])


class Items(Dataset[Any]):
    """Six items, each what ``make`` returns for its number."""

    def __init__(self, make: Callable[[int], Any], size: int = 6) -> None:
        self.make, self.size = make, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


def test_arrays_are_batched_by_rows() -> None:
    inputs, target = arrays(X, Y).fetch(IDS)
    assert torch.equal(inputs, torch.from_numpy(X[IDS]))
    assert torch.equal(target, torch.from_numpy(Y[IDS]))
    assert len(arrays(X, Y)) == 6


def test_arrays_keep_the_structure_of_inputs() -> None:
    inputs, _ = arrays((X, torch.from_numpy(Y)), Y).fetch(IDS)
    assert isinstance(inputs, tuple)
    assert [tuple(tensor.shape) for tensor in inputs] == [(3, 4), (3,)]
    inputs, _ = arrays({"x": X, "mask": X > 3}, Y).fetch(IDS)
    assert {name: tensor.dtype for name, tensor in inputs.items()} == {"x": torch.float32, "mask": torch.bool}


def test_a_list_is_one_array_not_several() -> None:
    inputs, target = arrays([[1.0, 2.0], [3.0, 4.0]], [0, 1]).fetch(np.array([1]))
    assert (inputs.tolist(), target.tolist()) == ([[3.0, 4.0]], [1])


def frozen(array: np.ndarray) -> np.ndarray:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


@pytest.mark.parametrize(
    "same",
    [X[::-1][::-1], X.T.copy().T, X.astype(">f4"), frozen(X)],
    ids=["twice reversed", "transposed", "big-endian", "read-only"],
)
def test_any_layout_of_memory_is_read(same: np.ndarray) -> None:
    inputs, _ = arrays(same, Y[::-1]).fetch(IDS)
    assert torch.equal(inputs, torch.from_numpy(X[IDS]))


def test_memory_is_shared_where_it_can_be() -> None:
    held = X.copy()
    source = arrays(held, Y)
    held[4] = -1
    assert (source.fetch(IDS)[0][0] == -1).all()


@pytest.mark.parametrize(
    ("inputs", "target", "message"),
    [
        (X, Y[:5], "inputs 6, target 5"),
        ((X, Y[:2]), Y, r"inputs\[0\] 6, inputs\[1\] 2, target 6"),
        ({"x": X, "m": X[:3]}, Y, r"inputs\['x'\] 6, inputs\['m'\] 3, target 6"),
        (X, np.float32(3.0), "inputs 6, target a single number"),
        (np.array(["a", "b"]), Y[:2], "<U1 is not numeric"),
    ],
)
def test_arrays_that_do_not_fit_are_named(inputs: Any, target: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        arrays(inputs, target)
    assert caught.value.remedy


@pytest.mark.parametrize(
    "make",
    [
        lambda i: (X[i], int(Y[i])),
        lambda i: (torch.from_numpy(X[i]), Y[i]),
        lambda i: ({"x": X[i], "n": float(i)}, torch.tensor(i)),
    ],
    ids=["numpy and int", "tensor and NumPy scalar", "dict"],
)
def test_a_dataset_is_batched_as_torchs_loader_does(make: Callable[[int], Any]) -> None:
    source = as_source(Items(make))
    inputs, target = source.fetch(np.arange(6))
    expected_inputs, expected_target = next(iter(DataLoader(Items(make), batch_size=6)))
    torch.testing.assert_close(inputs, expected_inputs, rtol=0, atol=0)
    torch.testing.assert_close(target, expected_target, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [tuple, list])
def test_several_inputs_come_as_a_tuple(kind: type) -> None:
    inputs, _ = as_source(Items(lambda i: (kind((X[i], i)), i))).fetch(IDS)
    assert isinstance(inputs, tuple)
    assert torch.equal(inputs[0], torch.from_numpy(X[IDS]))
    assert inputs[1].tolist() == [4, 0, 4]


def test_a_source_stays_as_it_is() -> None:
    source = arrays(X, Y)
    assert as_source(source) is source


def test_an_item_that_raises_is_named_with_the_users_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"sample 3 cannot be read: FileNotFoundError: .*3\.png") as caught:
        as_source(Items(lambda i: (X[i], i) if i != 3 else (tmp_path / "3.png").read_bytes())).fetch(np.array([1, 3]))
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    assert caught.value.where.startswith(f"{__file__}:")
    assert "in <lambda>" in caught.value.where


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (
            (X[0, :3], 0),
            r"inputs of sample 3 is float32 of shape \(3,\), but of sample 0 it is float32 of shape \(4,\)",
        ),
        ((X[0].astype(np.float64), 0), "inputs of sample 3 is float64 .*, but of sample 0 it is float32"),
        ((X[0], 0.5), "target of sample 3 is float, but of sample 0 it is int"),
        (((X[0], X[0]), 0), r"inputs of sample 3 is missing, but of sample 0 it is float32"),
        ((X[0], 0, 0), r"sample 3 cannot be batched: it is a tuple of 3 values instead of \(inputs, target\)"),
        (X[0], r"sample 3 cannot be batched: it is a ndarray instead of \(inputs, target\)"),
        (("text", 0), "sample 3 cannot be batched: its inputs is a str"),
        ((np.array(["text"]), 0), "sample 3 cannot be batched: its inputs is a ndarray"),
        (({"x": {"y": X[0]}}, 0), r"sample 3 cannot be batched: its inputs\['x'\] is a dict"),
    ],
)
def test_an_item_unlike_the_first_is_named(odd: Any, message: str) -> None:
    source = as_source(Items(lambda i: odd if i == 3 else (X[0], 0)))
    source.fetch(np.array([0, 1, 2]))
    with pytest.raises(DataError, match=message) as caught:
        source.fetch(np.array([3]))  # also where it is alone in its batch: which worker holds it must not matter
    assert caught.value.remedy
    assert "Items.__getitem__" in caught.value.where


def test_a_dataset_shorter_than_it_says_is_named() -> None:
    with pytest.raises(DataError, match="sample 5 cannot be read: IndexError"):
        as_source(Items(([(X[0], 0)] * 5).__getitem__)).fetch(np.array([5]))


def test_the_fingerprint_of_arrays_follows_content_shape_and_type() -> None:
    changed = X.copy()
    changed[5, 3] += 1
    different = [
        arrays(X, Y), arrays(changed, Y), arrays(X.reshape(6, 2, 2), Y), arrays(X.astype(np.float64), Y),
        arrays({"x": X}, Y), arrays({"y": X}, Y), arrays(X, Y[::-1]),
    ]  # fmt: skip
    assert len({source.fingerprint for source in different}) == len(different)
    assert arrays(torch.from_numpy(X.copy()), Y.copy()).fingerprint == arrays(X, Y).fingerprint


def test_the_fingerprint_of_large_arrays_is_sampled() -> None:
    large = np.zeros((20_000, 1000), np.float32)
    before = arrays(large, large[:, 0]).fingerprint
    large[0, 0] = 1
    first = arrays(large, large[:, 0].copy() * 0).fingerprint
    large[0, 0], large[-1, -1] = 0, 1
    last = arrays(large, large[:, 0]).fingerprint
    assert len({before, first, last}) == 3


def test_the_fingerprint_of_a_dataset_is_the_same_in_every_process() -> None:
    random = np.random.default_rng()
    augmented = [as_source(Items(lambda i: (X[i] + random.normal(size=4).astype(np.float32), i))) for _ in range(2)]
    assert augmented[0].fingerprint == augmented[1].fingerprint
    assert augmented[0].fingerprint != as_source(Items(lambda i: (X[i], i), size=5)).fingerprint
    assert augmented[0].fingerprint != as_source(Items(lambda i: (X[i, :3], i))).fingerprint
