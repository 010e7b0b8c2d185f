"""Optimizer steps on rows beside ``torch.optim`` on sparse gradients, and beside the dense step on the rows alone."""

from __future__ import annotations

from itertools import product
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from tricorn import optim
from tricorn.ps.sparse.spec import TableSpec
from tricorn.ps.sparse.store import SparseTable
from tricorn.table import Table

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")

ROWS, DIM, STEPS = 60, 16, 20  # whole vectors: what is left of one, PyTorch rounds otherwise
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])

OPTIMIZERS = [
    *(
        optim.SGD(lr=0.1, momentum=momentum, nesterov=nesterov, weight_decay=decay)
        for momentum, nesterov, decay in product((0.0, 0.9), (False, True), (0.0, 0.01))
        if momentum or not nesterov
    ),
    *(optim.Adagrad(lr=0.1, lr_decay=lr_decay, weight_decay=decay) for lr_decay, decay in product((0, 0.1), (0, 0.01))),
    *(kind(lr=0.1, weight_decay=decay) for kind, decay in product((optim.Adam, optim.AdamW), (0.0, 0.01))),
    *(optim.FTRL(lr=0.1, beta=beta, l1=l1, l2=l2) for beta, l1, l2 in product((1.0, 0.1), (0.0, 0.2), (0.0, 0.1))),
]


def table_of(optimizer: optim.RowOptimizer, dtype: Any) -> SparseTable:
    return SparseTable(TableSpec("e", DIM, dtype, 0, Table(std=0.5), optimizer, (0, 4096)))


def everything(table: SparseTable) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Weights and slots in the order of the ids."""
    (rows,) = table.export(10**6)
    order = np.argsort(rows.ids)
    return rows.weights[order], {name: slot[order] for name, slot in rows.slots.items()}


def close(found: np.ndarray, expected: np.ndarray, *, exact: bool = False) -> None:
    """Equal up to the rounding of twenty updates, some ulp each."""
    if exact:
        assert np.array_equal(found, expected)
    else:
        rtol = 1e-6 if found.dtype == np.float32 else 1e-14
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol)


def batches(dtype: str) -> list[tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(7)
    return [
        (random.choice(ROWS, 25, replace=False), random.standard_normal((25, DIM)).astype(dtype)) for _ in range(STEPS)
    ]


@DTYPES
@pytest.mark.parametrize(
    ("optimizer", "theirs"),
    [
        (optim.SGD(lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
        (optim.Adagrad(lr=0.1), lambda p: torch.optim.Adagrad(p, lr=0.1)),
        (optim.Adagrad(lr=0.1, lr_decay=0.2, eps=1e-3), lambda p: torch.optim.Adagrad(p, 0.1, lr_decay=0.2, eps=1e-3)),
        (optim.Adam(lr=0.1), lambda p: torch.optim.SparseAdam(p, lr=0.1)),
        (optim.Adam(lr=0.1, betas=(0.5, 0.9)), lambda p: torch.optim.SparseAdam(p, lr=0.1, betas=(0.5, 0.9))),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_twenty_updates_equal_torch_on_sparse_gradients(optimizer: Any, theirs: Any, dtype: Any) -> None:
    """SGD and all slots bit for bit, with a schedule."""
    table = table_of(optimizer, dtype)
    start = np.empty((ROWS, DIM), dtype)
    table.gather(np.arange(ROWS), start)
    param = torch.from_numpy(start.copy()).requires_grad_()
    reference = theirs([param])
    for step, (ids, grads) in enumerate(batches(dtype), 1):
        lr = 0.1 / step
        reference.param_groups[0]["lr"] = lr
        param.grad = torch.sparse_coo_tensor(torch.from_numpy(ids)[None], torch.from_numpy(grads), param.shape)
        reference.step()
        table.update(ids, grads.copy(), step=step, lr=lr)
    weights, slots = everything(table)
    # MKL's square root, which PyTorch calls, does not always round to the nearest float.
    close(weights, param.detach().numpy(), exact=isinstance(optimizer, optim.SGD))
    for name, slot in slots.items():
        assert np.array_equal(slot, reference.state[param][name].numpy()), name
    table.close()


@DTYPES
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_rows_are_updated_as_if_only_the_given_ones_existed(optimizer: Any, dtype: Any) -> None:
    table = table_of(optimizer, dtype)
    start = np.empty((ROWS, DIM), dtype)
    table.gather(np.arange(ROWS), start)
    dense = {name: torch.zeros(ROWS, DIM, dtype=getattr(torch, dtype)) for name in ("param", *optimizer.slots)}
    dense["param"].copy_(torch.from_numpy(start))
    for step, (ids, grads) in enumerate(batches(dtype), 1):
        dense_step = optimizer
        if isinstance(optimizer, optim.Adam):  # SparseAdam corrects the bias of what Adam adds eps to
            eps = optimizer.eps / (1 - optimizer.betas[1] ** step) ** 0.5
            dense_step = msgspec.structs.replace(optimizer, eps=eps)
        part = {name: tensor[ids].flatten() for name, tensor in dense.items()}
        param = part.pop("param")
        dense_step.update(param, torch.from_numpy(grads.copy()).flatten(), part, step=step, lr=0.1 / step)
        for name, tensor in (("param", param), *part.items()):
            dense[name][ids] = tensor.view(-1, DIM)
        table.update(ids, grads.copy(), step=step, lr=0.1 / step)
    weights, slots = everything(table)
    close(weights, dense["param"].numpy(), exact=isinstance(optimizer, optim.SGD))
    for name, slot in slots.items():
        close(slot, dense[name].numpy(), exact=isinstance(optimizer, optim.SGD))
    table.close()


@DTYPES
def test_rowwise_adagrad_is_adagrad_with_the_mean_of_a_rows_squares(dtype: Any) -> None:
    table = table_of(optim.RowwiseAdagrad(lr=0.1, eps=1e-3), dtype)
    weights = np.empty((ROWS, DIM), dtype)
    table.gather(np.arange(ROWS), weights)
    sums = np.zeros((ROWS, 1), dtype)
    for step, (ids, grads) in enumerate(batches(dtype), 1):
        sums[ids] += (grads**2).mean(axis=1, keepdims=True)
        weights[ids] -= 0.1 / step * grads / (np.sqrt(sums[ids]) + 1e-3)
        table.update(ids, grads.copy(), step=step, lr=0.1 / step)
    found, slots = everything(table)
    close(found, weights)
    assert slots["sum"].shape == (ROWS, 1)
    close(slots["sum"], sums)
    table.close()


def test_a_row_that_waits_is_not_updated_and_its_neighbours_are() -> None:
    """An id without a row yet stands between two that have one."""
    spec = TableSpec("e", DIM, "float32", 0, Table(admit=2), optim.Adam(lr=0.1), (0, 4096))
    table = SparseTable(spec)
    ones = np.ones((3, DIM), np.float32)
    table.update(np.array([1, 3]), ones[:2], step=1, lr=0.1)
    before, after = np.empty((3, DIM), np.float32), np.empty((3, DIM), np.float32)
    table.gather(np.arange(1, 4), before)
    table.update(np.arange(1, 4), ones, step=2, lr=0.1)
    table.gather(np.arange(1, 4), after)
    assert (before != after).all(axis=1).tolist() == [True, False, True]
    table.close()
