"""Compiled loops where nothing can be kept on disk, and that a process is warm after ``warm``."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from tricorn import optim
from tricorn.comm.kernel import kernel
from tricorn.ps.sparse import ids as ids_module
from tricorn.ps.sparse import index, initial, reader, records, rows, warm
from tricorn.ps.sparse.reader import RowReader
from tricorn.ps.sparse.spec import BUCKETS, TableSpec
from tricorn.ps.sparse.store import SparseTable
from tricorn.table import Table


def test_a_kernel_works_where_no_folder_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    monkeypatch.setenv("HOME", "/proc/nowhere")
    names: dict[str, object] = {}
    exec(compile("def double(x):\n    return 2 * x\n", "/proc/nowhere/module.py", "exec"), names)
    assert kernel(cast(Any, names["double"]))(21) == 42


def test_a_kernel_is_kept_beside_its_module() -> None:
    warm()
    kept = Path(rows.__file__).parent / "__pycache__"
    assert list(kept.glob("rows._adam-*.nbc"))


def test_after_warming_nothing_is_compiled() -> None:
    """Whatever the table's type and optimizer, and whoever made the arrays."""
    warm()
    before = signatures()
    for dtype, optimizer in product(
        ("float32", "float64"), (optim.SGD(lr=1.0), optim.AdamW(lr=1.0), optim.FTRL(lr=1.0))
    ):
        table = SparseTable(TableSpec("e", 5, dtype, 0, Table(std=0, max_rows=40), optimizer, (0, BUCKETS)))
        for start in range(1, 100, 10):
            ids = np.frombuffer(np.arange(start, start + 30).tobytes(), np.int64)
            values = torch.zeros(30, 5, dtype=getattr(torch, dtype)).numpy()
            table.update(ids, values, step=start, lr=1)
            other = RowReader(table.ticket)
            other.gather(ids[::2], values[:15])
            other.close()
        table.close()
    assert signatures() == before


def signatures() -> dict[str, int]:
    """How many versions there are of each compiled function."""
    return {
        f"{module.__name__}.{name}": len(function.signatures)
        for module in (ids_module, index, initial, reader, records, rows)
        for name, function in vars(module).items()
        if hasattr(function, "signatures")
    }
