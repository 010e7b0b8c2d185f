"""What every rank computes alike from equal factors: no BLAS, whose sums depend on the machine and on alignment.

Legend as in powersgd.py. None uses ``fastmath``: every machine gets the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tricorn.comm.kernel import kernel

Matrix = NDArray[Any]  # float32 or float64


@kernel
def orthogonalise(rows_RA: Matrix) -> None:
    """Make the rows orthonormal in place (Gram-Schmidt, sums in float64). One that depends on others becomes zero."""
    for r in range(len(rows_RA)):
        before = _dot(rows_RA[r], rows_RA[r])
        for _ in range(2):  # once more for what cancellation left (Giraud et al. 2005: twice is enough)
            for other in range(r):
                along = _dot(rows_RA[r], rows_RA[other])
                for a in range(rows_RA.shape[1]):
                    rows_RA[r, a] -= along * rows_RA[other, a]
        after = _dot(rows_RA[r], rows_RA[r])
        scale = 1 / np.sqrt(after) if after > 1e-12 * before else 0.0
        for a in range(rows_RA.shape[1]):
            rows_RA[r, a] *= scale


@kernel
def product(left_RA: Matrix, right_RB: Matrix, out_AB: Matrix) -> None:
    """left_RA^T @ right_RB."""
    for a in range(len(out_AB)):
        row = out_AB[a]
        row[:] = 0
        for r in range(len(left_RA)):
            factor, right = left_RA[r, a], right_RB[r]
            for b in range(len(row)):
                row[b] += factor * right[b]


@kernel
def _dot(x: Matrix, y: Matrix) -> float:
    total = 0.0
    for i in range(len(x)):
        total += np.float64(x[i]) * np.float64(y[i])
    return total
