"""PowerSGD (Vogels, Karimireddy and Jaggi 2019): a sum of matrices, sent as two thin ones.

One step of the power method for each sum, begun from the right factor of the last one, so that the factors follow
the gradient from step to step.

Legend: A x B a parameter's gradient as a matrix (first dimension by all others), R the rank, and for the sum of all
ranks' matrices M_AB ~ P_RA^T Q_RB, with orthonormal rows in P_RA.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tricorn.dp.wire import Wire
    from tricorn.state.flat import Entry

RANK = 4


class Matrix(NamedTuple):
    """A parameter that is sent as two factors: elements [start, stop) of the flat layout, as a matrix A x B."""

    start: int
    stop: int
    rows: int
    columns: int


def matrices(entries: Sequence[Entry], rank: int) -> list[Matrix]:
    """The parameters whose factors have less than half as many elements as they."""
    found = []
    for entry in entries:
        if len(entry.shape) > 1 and 0 not in entry.shape:
            rows, columns = entry.shape[0], prod(entry.shape[1:])
            if 2 * rank * (rows + columns) < rows * columns:
                found.append(Matrix(entry.start, entry.stop, rows, columns))
    return found


class PowerSum:
    """Fulfils ``tricorn.dp.compress.Compressor``. Biases and small matrices are summed as they are.

    Each rank keeps back what of its own matrix the factors do not say. Only sums, orthogonalising and the product
    stand between the ranks and equal bits: the first come in rank order, the others from kernels that compute the
    same on every machine, which a BLAS does not.
    """

    def __init__(self, entries: Sequence[Entry], dtype: torch.dtype, rank: int = RANK) -> None:
        self._rank = rank
        self._matrices = matrices(entries, rank)
        self._kept_N = torch.zeros(entries[-1].stop if entries else 0, dtype=dtype)
        self._right: dict[int, Tensor] = {}  # where a matrix starts -> Q_RB of the last sum

    def sum(self, wire: Wire, flat: Tensor, start: int, step: int) -> None:
        from tricorn.dp import powersgd_kernels as kernels

        here = [m for m in self._matrices if start <= m.start < start + len(flat)]
        local = flat.cpu()
        whole = [local[m.start - start : m.stop - start].view(m.rows, m.columns) for m in here]
        rest = self._outside(local, start, here)
        right = [self._begun(m, step) for m in here]
        wanted = [
            matrix_AB + self._kept_N[m.start : m.stop].view(m.rows, m.columns)
            for m, matrix_AB in zip(here, whole, strict=True)
        ]
        left = [q_RB @ w_AB.T for q_RB, w_AB in zip(right, wanted, strict=True)]
        self._sum_all(wire, [*left, *rest])
        for p_RA in left:
            kernels.orthogonalise(p_RA.numpy())
        right = [p_RA @ w_AB for p_RA, w_AB in zip(left, wanted, strict=True)]
        for m, p_RA, q_RB, w_AB in zip(here, left, right, wanted, strict=True):
            torch.sub(w_AB, p_RA.T @ q_RB, out=self._kept_N[m.start : m.stop].view(m.rows, m.columns))
        self._sum_all(wire, right)
        for m, p_RA, q_RB, matrix_AB in zip(here, left, right, whole, strict=True):
            kernels.product(p_RA.numpy(), q_RB.numpy(), matrix_AB.numpy())
            self._right[m.start] = q_RB
        if local is not flat:
            flat.copy_(local)

    def forget(self) -> None:
        self._kept_N.zero_()
        self._right.clear()

    def _begun(self, matrix: Matrix, step: int) -> Tensor:
        """The right factor to begin from: the last one; random where it is zero, which it would otherwise stay."""
        q_RB = self._right.get(matrix.start)
        if q_RB is None:
            q_RB = torch.zeros(self._rank, matrix.columns, dtype=self._kept_N.dtype)
        if (vanished := ~q_RB.any(1)).any():
            generator = torch.Generator().manual_seed(matrix.start * 0x9E37_79B1 + step)
            q_RB[vanished] = torch.randn(q_RB.shape, generator=generator, dtype=torch.float64).to(q_RB)[vanished]
        return q_RB

    @staticmethod
    def _outside(local: Tensor, start: int, here: Sequence[Matrix]) -> list[Tensor]:
        """The parts of a slice that are in none of the matrices."""
        edges = [start, *(edge for m in here for edge in (m.start, m.stop)), start + len(local)]
        return [
            local[low - start : high - start] for low, high in zip(edges[::2], edges[1::2], strict=True) if low < high
        ]

    @staticmethod
    def _sum_all(wire: Wire, tensors: Sequence[Tensor]) -> None:
        """Replace each by its sum over all ranks, with one message for all."""
        if tensors:
            together = torch.cat([tensor.flatten() for tensor in tensors])
            wire.all_reduce(together)
            for tensor, summed in zip(tensors, torch.split(together, [t.numel() for t in tensors]), strict=True):
                tensor.view(-1).copy_(summed)
