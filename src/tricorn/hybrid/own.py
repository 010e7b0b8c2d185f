"""A worker's block of an embedding: its weights and the optimizer's slots, and how they are updated.

Legend: r rows of the block and d of its columns; U ids of one table, all of rows in the block; D columns of the table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from tricorn.errors import PlanError
from tricorn.optim import RowwiseAdagrad
from tricorn.state.shards import CheckpointReader, Piece

if TYPE_CHECKING:
    from tricorn.hybrid.division import Block
    from tricorn.state.rows import RowTable

_CHUNK = 1 << 16  # rows made at a time


def by_rows(table: RowTable, declared: bool) -> bool:
    """Whether a row is updated in the steps that have its id and left alone in the others."""
    return declared or table.optimizer.by_rows


class Own:
    """``given_RD``: the weights of a model that has them; without, rows begin as those of a declared table."""

    def __init__(self, table: RowTable, block: Block, seed: int, dtype: torch.dtype, given_RD: Tensor | None) -> None:
        assert not isinstance(table.optimizer, RowwiseAdagrad), "refused before"
        self.table = table
        self.block = block
        self._by_rows = by_rows(table, given_RD is None)
        self.weights_rd = torch.empty(block.rows, block.width, dtype=dtype)
        if given_RD is None:
            self._begin(seed)
        else:
            self.weights_rd.copy_(given_RD[block.first : block.last, block.left : block.right])
        self._slots = {slot: torch.zeros_like(self.weights_rd) for slot in table.optimizer.slots}
        self._pending: tuple[Tensor, Tensor] | None = None  # ids, and the sums of their gradients [U, d]

    def gather(self, ids_U: Tensor) -> Tensor:
        """Copies of these rows' columns of the block, [U, d]. Raises PlanError for an id that is none of its rows."""
        return self.weights_rd[self._places(ids_U)]

    def learn(self, ids_N: Tensor, grads_Nd: Tensor) -> float:
        """Have the gradients of all workers' look-ups, one id maybe several times; the squared norm of their sum."""
        from tricorn.ps.sparse.ids import sum_rows, unique

        ids_U, inverse_N = unique(ids_N.numpy())
        sum_Ud = grads_Nd.new_empty(len(ids_U), self.block.width)
        sum_rows(inverse_N, grads_Nd.numpy(), sum_Ud.numpy())
        self._pending = torch.from_numpy(ids_U), sum_Ud
        return float(sum_Ud.double().square().sum())

    def forget(self) -> None:
        self._pending = None

    def update(self, step: int, *, scale: float, factor: float) -> None:
        """Apply the gradients times ``scale`` as update number ``step``, from 1, the rate times ``factor``."""
        assert self._pending is not None
        ids_U, grads_Ud = self._pending
        self._pending = None
        grads_Ud.mul_(scale)
        optimizer = self.table.optimizer
        rate = optimizer.lr * factor
        if self._by_rows:
            self._update_rows(self._places(ids_U), grads_Ud, step, rate)
            return
        assert not isinstance(optimizer, RowwiseAdagrad)
        grads_rd = torch.zeros_like(self.weights_rd)
        grads_rd[self._places(ids_U)] = grads_Ud
        slots = {slot: flat.view(-1) for slot, flat in self._slots.items()}
        optimizer.update(self.weights_rd.view(-1), grads_rd.view(-1), slots, step=step, lr=rate)

    def _update_rows(self, places_U: Tensor, grads_Ud: Tensor, step: int, rate: float) -> None:
        from tricorn.ps.sparse.rows import step_of

        if not len(places_U):
            return
        columns = [self.weights_rd, *self._slots.values()]
        numbers = torch.cat([column[places_U] for column in columns], 1)
        kernel, constants = step_of(self.table.optimizer, step, rate)
        flat = numbers.view(-1).numpy()
        kernel(flat, numbers.shape[1], 0, np.arange(len(places_U)), grads_Ud.numpy(), np.array(constants, flat.dtype))
        for column, part in zip(columns, torch.split(numbers, self.block.width, 1), strict=True):
            column[places_U] = part

    def pieces(self) -> list[Piece]:
        """Copies of weights and slots."""
        if not self.weights_rd.numel():
            return []
        shape, runs = (self.table.rows, self.table.dim), self.block.runs(self.table.dim)
        return [Piece.of(key, shape, runs, flat.clone().view(-1)) for key, flat in self._flats().items()]

    def load(self, reader: CheckpointReader) -> None:
        """Take weights and slots from a checkpoint written under any plan. Raises UsageError, CheckpointDamaged."""
        if not self.weights_rd.numel():
            return
        shape, runs = (self.table.rows, self.table.dim), self.block.runs(self.table.dim)
        for key, flat in self._flats().items():
            flat.view(-1).copy_(reader.read_part(key, shape, runs))

    def _flats(self) -> dict[str, Tensor]:
        name = self.table.parameter
        return {f"param/{name}": self.weights_rd} | {f"optim/{slot}/{name}": t for slot, t in self._slots.items()}

    def _places(self, ids_U: Tensor) -> Tensor:
        places_U = ids_U - self.block.first
        if len(places_U) and not 0 <= int(places_U.min()) <= int(places_U.max()) < self.block.rows:
            raise PlanError(f"an id of embedding {self.table.name!r} came to a worker that has not its row")
        return places_U

    def _begin(self, seed: int) -> None:
        from tricorn.ps.sparse.initial import initial_rows

        table, block = self.table, self.block
        dtype: Literal["float32", "float64"] = "float64" if self.weights_rd.dtype == torch.float64 else "float32"
        for start in range(block.first, block.last, _CHUNK):
            ids = np.arange(start, min(start + _CHUNK, block.last))
            rows = initial_rows(seed, table.name, ids, table.declared.std, table.dim, dtype)
            here = start - block.first
            self.weights_rd[here : here + len(ids)] = torch.from_numpy(rows[:, block.left : block.right])
        if table.padding is not None and block.first <= table.padding < block.last:
            self.weights_rd[table.padding - block.first] = 0
