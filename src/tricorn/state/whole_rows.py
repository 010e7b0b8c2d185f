"""Checkpoints of tables read as whole weights, by strategies that train an embedding whole.

Legend: R rows of an embedding, of D elements each.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tricorn.errors import CheckpointDamaged, UsageError
from tricorn.state.flat import model_without_rows
from tricorn.state.row_shards import read_rows
from tricorn.state.rows import RowTable, begin_table, row_tables
from tricorn.state.runs import Runs
from tricorn.state.shards import CheckpointReader

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tricorn.job import Job


def open_checkpoint(job: Job, folder: Path, step: int) -> CheckpointReader:
    """A reader for which the tables of a job are weights and slots like all others, whatever strategy wrote them."""
    return _WholeRows(job, folder, step)


class _WholeRows(CheckpointReader):
    """Rows that never came into being are as they begin: those of the job's seed, with slots of zero."""

    def __init__(self, job: Job, folder: Path, step: int) -> None:
        super().__init__(folder, step)
        self._job = job
        self._tables: dict[str, RowTable] = {}
        if any(key.startswith("rows/") for key in self._stored):
            tables = row_tables(job, model_without_rows(job))
            self._tables = {table.parameter: table for table in tables if f"rows/{table.name}/ids" in self}
        self._newest: tuple[str, Tensor] = ("", torch.empty(0))  # slices of one tensor are mostly read in a row

    def __contains__(self, key: str) -> bool:
        return super().__contains__(key) or self._table(key) is not None

    def read_part(self, key: str, shape: Sequence[int], runs: Runs) -> Tensor:
        table = self._table(key)
        if table is None:
            return super().read_part(key, shape, runs)
        if self._newest[0] != key:
            self._newest = key, self._whole(table, "" if key.startswith("param/") else key.split("/")[1])
        return runs.of(self._newest[1]).reshape(-1)

    def _table(self, key: str) -> RowTable | None:
        return self._tables.get(key.rpartition("/")[2])

    def _whole(self, table: RowTable, slot: str) -> Tensor:
        """The flattened weight, or slot, of an embedding."""
        dtype = torch.float64 if self._job.precision == "float64" else torch.float32
        whole_RD = torch.zeros(table.rows, table.dim, dtype=dtype)
        if not slot and not table.prefilled:
            begin_table(self._job, table, whole_RD)
        found = 0
        for chunk in read_rows(self, table.name, table.dim, {slot: table.dim} if slot else {}, dtype):
            ids_R = torch.from_numpy(chunk.ids)
            if len(beyond := ids_R[(ids_R < 0) | (ids_R >= table.rows)]):
                raise UsageError(
                    f"table {table.name!r} has the id {beyond[0].item()} in the checkpoint {self.folder}, and the "
                    f"embedding only {table.rows} rows",
                    remedy="Go on with --strategy ps, whose tables take any id, or give the embedding more rows.",
                )
            whole_RD[ids_R] = torch.from_numpy(chunk.slots[slot] if slot else chunk.weights)
            found += len(ids_R)
        if table.prefilled and found < table.rows:
            raise CheckpointDamaged(f"the checkpoint {self.folder} has {found} of {table.rows} rows of {table.name!r}")
        return whole_RD.view(-1)
