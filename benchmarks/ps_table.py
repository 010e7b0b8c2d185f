"""Rows a second that a sparse table reads and updates, and the memory that a row takes; beside what one would do
without it: a dict of tensors, and nn.EmbeddingBag(sparse=True) with torch.optim.SparseAdam, whose table cannot grow.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import numpy as np
import torch
from common import Report, options
from torch import nn

from tricorn import optim
from tricorn.ps.sparse.spec import BUCKETS, TableSpec
from tricorn.ps.sparse.store import SparseTable
from tricorn.table import Table

DIM, BATCH = 16, 10_000


def rate(action: Callable[[torch.Tensor], None], batches: list[torch.Tensor]) -> list[float]:
    """Rows a second, batch by batch; the first is not counted."""
    found = []
    for ids in batches:
        began = time.perf_counter()
        action(ids)
        found.append(len(ids) / (time.perf_counter() - began))
    return found[1:]


def tricorn(
    report: Report, optimizer: optim.RowOptimizer, rows: int, batches: list[torch.Tensor]
) -> tuple[float, float]:
    """Rows updated a second, and the memory taken for each byte of keys, rows and state."""
    kind = type(optimizer).__name__
    table = SparseTable(TableSpec("t", DIM, "float32", 0, Table(std=0.01), optimizer, (0, BUCKETS)))
    for start in range(0, rows, 1 << 18):
        ids = np.arange(start, min(rows, start + (1 << 18)))
        table.update(ids, np.zeros((len(ids), DIM), np.float32), step=1, lr=0.0)
    case, out, grads = f"{rows:,} rows, {kind}", np.empty((BATCH, DIM), np.float32), np.ones((BATCH, DIM), np.float32)
    report.row(
        "tricorn", f"{case}: read", rate(lambda ids: table.gather(ids.numpy(), out[: len(ids)]), batches), "rows/s"
    )
    updates = rate(lambda ids: table.update(ids.numpy(), grads[: len(ids)], step=2, lr=0.01), batches)
    speed = report.row("tricorn", f"{case}: update", updates, "rows/s")
    touched = os.stat(f"/proc/self/fd/{table.ticket.memory.fd}").st_blocks * 512
    needed = rows * (8 + 4 * DIM * (1 + len(optimizer.slots)))
    report.row("tricorn", f"{case}: memory", [touched / rows], "bytes/row")
    table.close()
    return speed, touched / needed


def of_a_dict(report: Report, rows: int, batches: list[torch.Tensor]) -> float:
    table = {id: torch.zeros(DIM) for id in range(rows)}
    case = f"{rows:,} rows, SGD"
    report.row(
        "dict of tensors",
        f"{case}: read",
        rate(lambda ids: torch.stack([table[i] for i in ids.tolist()]), batches),
        "rows/s",
    )

    def update(ids: torch.Tensor) -> None:
        for id, grad in zip(ids.tolist(), torch.ones(len(ids), DIM), strict=True):
            table[id].add_(grad, alpha=-0.01)

    return report.row("dict of tensors", f"{case}: update", rate(update, batches), "rows/s")


def of_torch(report: Report, rows: int, batches: list[torch.Tensor]) -> float:
    bag = nn.EmbeddingBag(rows, DIM, sparse=True, mode="sum")
    optimizer = torch.optim.SparseAdam(bag.parameters(), lr=0.01)
    offsets, case = torch.arange(BATCH), f"{rows:,} rows, Adam"

    def read(ids: torch.Tensor) -> None:
        with torch.no_grad():
            bag(ids, offsets[: len(ids)])

    def update(ids: torch.Tensor) -> None:
        bag.weight.grad = torch.sparse_coo_tensor(ids[None], torch.ones(len(ids), DIM), bag.weight.shape)
        optimizer.step()

    report.row("nn.EmbeddingBag", f"{case}: read", rate(read, batches), "rows/s")
    return report.row("nn.EmbeddingBag, SparseAdam", f"{case}: update", rate(update, batches), "rows/s")


def main() -> None:
    report, chosen = options("sparse tables: reading, updating, memory")
    torch.set_num_threads(1)
    torch.sparse.check_sparse_tensor_invariants.disable()
    random = torch.Generator().manual_seed(0)
    memory: dict[tuple[int, str], float] = {}
    against: dict[int, float] = {}
    for rows in (100_000, 1_000_000) if chosen.quick else (100_000, 1_000_000, 10_000_000):
        batches = [torch.randint(rows, (BATCH,), generator=random).unique() for _ in range(20)]
        sgd, memory[rows, "SGD"] = tricorn(report, optim.SGD(lr=0.1), rows, batches)
        adam, memory[rows, "Adam"] = tricorn(report, optim.Adam(lr=0.1), rows, batches)
        against[rows] = adam / of_torch(report, rows, batches)
        if rows == 100_000:
            report.bar(
                f"update, {rows:,} rows: tricorn / dict of tensors", sgd / of_a_dict(report, rows, batches), at_least=10
            )
    for rows, ratio in against.items():
        report.bar(f"update, {rows:,} rows: tricorn / SparseAdam", ratio, at_least=1.0)
    for (rows, kind), ratio in memory.items():
        report.bar(f"memory of {rows:,} rows, {kind} / keys, rows and state", ratio, at_most=1.3)
    report.print(chosen.json)


if __name__ == "__main__":
    main()
