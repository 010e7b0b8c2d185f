"""Copies of more memory than a cache holds.

Stores that pass by the cache spare it the reading of what is overwritten: 16 MB take 0.95 ms instead of 1.8.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tricorn.comm.kernel import kernel

LEAST = 4 << 20  # bytes; who reads less soon after finds it in a cache
_LINE = 64
_I64 = ir.IntType(64)


@intrinsic
def _stream(typing: Any, to: Any, of: Any, lines: Any) -> Any:
    """Copy cache lines to an address that is a multiple of their size."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, of, lines = arguments
        line = ir.VectorType(_I64, 8)
        passing = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        with cgutils.for_range(builder, lines) as loop:
            offset = builder.mul(loop.index, ir.Constant(_I64, _LINE))
            value = builder.load(builder.inttoptr(builder.add(of, offset), line.as_pointer()), align=1)
            store = builder.store(value, builder.inttoptr(builder.add(to, offset), line.as_pointer()), align=_LINE)
            store.set_metadata("nontemporal", passing)
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@kernel
def _copy(to: int, of: int, lines: int) -> None:
    _stream(to, of, lines)


def copy(to: memoryview, of: memoryview) -> None:
    """``to[:] = of``, of bytes; they may not overlap."""
    if len(to) != len(of):
        raise ValueError(f"{len(of)} bytes do not fill {len(to)}")
    if len(to) < LEAST:
        to[:] = of
        return
    address = np.frombuffer(to, np.uint8).ctypes.data
    head = -address % _LINE
    lines, tail = divmod(len(to) - head, _LINE)
    to[:head] = of[:head]
    _copy(address + head, np.frombuffer(of, np.uint8).ctypes.data + head, lines)
    if tail:
        to[-tail:] = of[-tail:]
