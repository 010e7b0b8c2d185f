"""The first value of a row: a function of the seed, the table's name and the id alone.

Element d of a row is ``std`` times a standard normal number, from a stream of random numbers that belongs to the id:
SplitMix64 (Steele, Lea and Flood 2014), turned normal in pairs by Box and Muller (1958). It is computed in float64
and rounded to float32 where that is the table's type. So it does not matter which process computes it, or when, or
how many other ids there are; nor does an element depend on how many the row has.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tricorn.comm.kernel import kernel
from tricorn.ps.sparse.ids import Ids, mix

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # the step of SplitMix64
_11 = np.uint64(11)
_ULP = 2.0**-53
_TURN = 2.0 * np.pi


def stream_key(seed: int, name: str) -> np.uint64:
    """What tells the rows of one table and seed from those of others."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


@kernel
def write_initial(out_D: NDArray[Any], key: Any, id: Any, std: float) -> None:
    state = mix(key + mix(np.uint64(id)))
    for d in range(0, len(out_D), 2):
        state += _GOLDEN
        radius = std * np.sqrt(-2.0 * np.log((np.float64(mix(state) >> _11) + 1.0) * _ULP))
        state += _GOLDEN
        angle = _TURN * (np.float64(mix(state) >> _11) * _ULP)
        out_D[d] = radius * np.cos(angle)
        if d + 1 < len(out_D):
            out_D[d + 1] = radius * np.sin(angle)


@kernel
def _write_all(out_UD: NDArray[Any], key: Any, ids_U: Ids, std: float) -> None:
    for u in range(len(ids_U)):
        write_initial(out_UD[u], key, ids_U[u], std)


def initial_rows(
    seed: int, name: str, ids_U: Ids, std: float, dim: int, dtype: Literal["float32", "float64"]
) -> NDArray[Any]:
    """The first values of these rows, [U, dim]."""
    out_UD = np.empty((len(ids_U), dim), dtype)
    _write_all(out_UD, stream_key(seed, name), ids_U, float(std))
    return out_UD
