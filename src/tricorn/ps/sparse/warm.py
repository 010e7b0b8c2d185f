"""Every kernel, called once with next to nothing to do."""

from __future__ import annotations

from typing import Literal

import numpy as np

from tricorn.optim import FTRL, SGD, Adagrad, Adam, RowOptimizer, RowwiseAdagrad
from tricorn.ps.sparse.ids import first_repeated, split, sum_rows, sum_runs, unique
from tricorn.ps.sparse.initial import initial_rows
from tricorn.ps.sparse.spec import BUCKETS, TableSpec
from tricorn.ps.sparse.store import SparseTable
from tricorn.table import Table

_OPTIMIZERS: tuple[RowOptimizer, ...] = (
    SGD(lr=0.1), SGD(lr=0.1, momentum=0.9), Adagrad(lr=0.1), Adam(lr=0.1), FTRL(lr=0.1), RowwiseAdagrad(lr=0.1),
)  # fmt: skip
_DTYPES: tuple[Literal["float32", "float64"], ...] = ("float32", "float64")


def warm_up() -> None:
    ids_N = np.array([3, 1, 3])
    ids_U, inverse_N = unique(ids_N)
    first_repeated(ids_U)
    split(ids_U, np.array([BUCKETS]))
    for dtype in _DTYPES:
        rows_UD = np.zeros((len(ids_U), 2), dtype)
        grads_ND = initial_rows(0, "", ids_N, 1.0, 2, dtype)
        sum_rows(inverse_N, grads_ND, rows_UD)
        sum_runs(inverse_N, grads_ND.reshape(-1), 1, 2, rows_UD)
        for optimizer in _OPTIMIZERS:
            table = SparseTable(TableSpec("", 2, dtype, 0, Table(admit=2, ttl=1), optimizer, (0, BUCKETS)))
            for step in (1, 2):
                table.update(ids_U, rows_UD, step=step, lr=0.0)
            table.gather(ids_U, rows_UD)
            for rows in table.export(2):
                table.load(rows)
            table.tick(9)
            table.close()
