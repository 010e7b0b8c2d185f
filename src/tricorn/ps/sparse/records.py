"""Writing records: how one begins, that it was used, and the checks of what is to be written.

Legend: U ids, D elements of a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tricorn.comm.kernel import kernel
from tricorn.ps.sparse.ids import Ids
from tricorn.ps.sparse.index import COUNT, USED, Places, Words
from tricorn.ps.sparse.initial import write_initial

_MOST = np.int32(2**31 - 1)

Halves = NDArray[np.int32]


@kernel
def begin(
    words: Words, width: int, numbers: NDArray[Any], stride: int, first: int,
    start: int, ids_U: Ids, count: int, dim: int, key: Any, std: float,
) -> None:  # fmt: skip
    """Write new records from ``start`` on: seen ``count`` times, weights at their first values, slots at zero."""
    for u in range(len(ids_U)):
        at = (start + u) * width
        words[at] = ids_U[u]
        words[at + 1] = count
        row = numbers[(start + u) * stride + first : (start + u + 1) * stride]
        write_initial(row[:dim], key, ids_U[u], std)
        row[dim:] = 0


@kernel
def touch(halves: Halves, width: int, places_U: Places, step: int) -> None:
    """Count a use of these records in that step; places below 0 are passed over."""
    for at in places_U:
        if at >= 0:
            count = halves[at * 2 * width + COUNT]
            halves[at * 2 * width + COUNT] = min(count, _MOST - np.int32(1)) + np.int32(1)
            halves[at * 2 * width + USED] = step


@kernel
def first_not_finite(bits: NDArray[Any], infinite: Any) -> int:
    """The first number that is not finite, -1 if there is none; the numbers as integers of their size."""
    largest = infinite ^ infinite
    for n in range(len(bits)):
        largest = max(largest, bits[n] & infinite)  # the exponent alone
    if largest == infinite:
        for n in range(len(bits)):
            if bits[n] & infinite == infinite:
                return n
    return -1
