"""What one server is told of a sparse table."""

from __future__ import annotations

from typing import Literal

import msgspec

from tricorn.optim import RowOptimizer
from tricorn.table import Table

BUCKETS = 4096  # the fixed slices of a table, by a hash of the id: the unit in which servers share it


class TableSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of rows of ``dim`` elements, of which this server has ``buckets`` [first, last + 1) of ``BUCKETS``.

    ``declared``: how the job declares it; ``optimizer``: what updates its rows, with nothing left to default.
    ``prefilled``: the rows 0 to ``prefilled`` - 1 have weights that the model gave; 0 if rows begin by themselves.
    """

    name: str
    dim: int
    dtype: Literal["float32", "float64"]
    seed: int
    declared: Table
    optimizer: RowOptimizer
    buckets: tuple[int, int]
    prefilled: int = 0
