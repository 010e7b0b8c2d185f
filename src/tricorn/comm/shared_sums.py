"""Element-wise reductions over the memory of all ranks at once, in rank order, so that every rank gets the same bits.

Each block of the result is accumulated in the first-level cache and written once. Half-precision numbers are
accumulated in float32 and rounded once, at the end.
"""

from __future__ import annotations

import contextlib
import fcntl
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from tricorn.comm.kernel import callback, kernel
from tricorn.errors import UsageError

BLOCK = 2048  # elements: at most 16 KB, half of a first-level cache

SUM, PRODUCT, MIN, MAX, BAND, BOR, BXOR, AVG = range(8)
OPERATIONS = {
    "sum": SUM,
    "product": PRODUCT,
    "min": MIN,
    "max": MAX,
    "band": BAND,
    "bor": BOR,
    "bxor": BXOR,
    "avg": AVG,
}
_BITWISE = {BAND, BOR, BXOR}


@intrinsic
def _pointer(typing: Any, address: Any, like: Any) -> Any:
    """The address as a pointer of the same type as the other argument."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], arguments[1].type)

    return like(types.int64, like), generate


@intrinsic
def _address(typing: Any, pointer: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ptrtoint(arguments[0], ir.IntType(64))

    return types.int64(pointer), generate


@intrinsic
def copy(typing: Any, target: Any, source: Any, count: Any) -> Any:
    """Move bytes between addresses; the two stretches may overlap."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        target, source = (builder.inttoptr(address, byte) for address in arguments[:2])
        move = builder.module.declare_intrinsic(
            "llvm.memmove", (byte, byte, ir.IntType(64)),
            ir.FunctionType(ir.VoidType(), (byte, byte, ir.IntType(64), ir.IntType(1))),
        )  # fmt: skip
        builder.call(move, (target, source, arguments[2], ir.Constant(ir.IntType(1), 0)))

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def call(
    typing: Any,
    function: Any,
    target: Any,
    second: Any,
    sources: Any,
    ranks: Any,
    count: Any,
    operation: Any,
    room: Any,
) -> Any:
    """Call one of the functions that ``reduction`` gives; all arguments are integers, addresses included."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [word] * 7).as_pointer()
        builder.call(builder.inttoptr(arguments[0], kind), arguments[1:])

    return types.void(*[types.int64] * 8), generate


@intrinsic
def _float_from(typing: Any, bits: Any) -> Any:
    """The float32 of a float16, given as uint16, or of its own bits, given as uint32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if bits == types.uint16:
            return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(bits), generate


@intrinsic
def _half_of(typing: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


@intrinsic
def _bits_of(typing: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@kernel
def _accumulate(total: Any, part: Any, count: int, operation: int) -> None:
    if operation == PRODUCT:
        for i in range(count):
            total[i] *= part[i]
    elif operation == MIN:
        for i in range(count):
            total[i] = min(total[i], part[i])
    elif operation == MAX:
        for i in range(count):
            total[i] = max(total[i], part[i])
    else:
        for i in range(count):
            total[i] += part[i]


@kernel
def _accumulate_bits(total: Any, part: Any, count: int, operation: int) -> None:
    if operation == BAND:
        for i in range(count):
            total[i] &= part[i]
    elif operation == BOR:
        for i in range(count):
            total[i] |= part[i]
    elif operation == BXOR:
        for i in range(count):
            total[i] ^= part[i]
    else:
        _accumulate(total, part, count, operation)


@kernel
def _put(source: int, target: int, second: int, size: int) -> None:
    copy(target, source, size)
    if second:
        copy(second, source, size)


# Of each kernel: target, second (bytes at which the result is wanted as well, or 0), sources (an address for each
# rank; the target may be one of them), ranks, count (elements), operation, room (for a block).


def _floats(target: Any, second: int, sources: Any, ranks: int, count: int, operation: int, room: Any) -> None:
    total, parts = carray(room, BLOCK), carray(sources, ranks)
    size = total.itemsize
    for start in range(0, count, BLOCK):
        length, offset = min(BLOCK, count - start), start * size
        copy(_address(room), parts[0] + offset, length * size)
        for rank in range(1, ranks):
            _accumulate(total, carray(_pointer(parts[rank] + offset, room), BLOCK), length, operation)
        if operation == AVG:
            for i in range(length):
                total[i] /= ranks
        _put(_address(room), _address(target) + offset, second + offset if second else 0, length * size)


def _integers(target: Any, second: int, sources: Any, ranks: int, count: int, operation: int, room: Any) -> None:
    total, parts = carray(room, BLOCK), carray(sources, ranks)
    size = total.itemsize
    for start in range(0, count, BLOCK):
        length, offset = min(BLOCK, count - start), start * size
        copy(_address(room), parts[0] + offset, length * size)
        for rank in range(1, ranks):
            _accumulate_bits(total, carray(_pointer(parts[rank] + offset, room), BLOCK), length, operation)
        _put(_address(room), _address(target) + offset, second + offset if second else 0, length * size)


@kernel
def _float16(bits: int) -> Any:
    return _float_from(bits)


@kernel
def _bfloat16(bits: int) -> Any:
    return _float_from(np.uint32(np.uint32(bits) << np.uint32(16)))


@kernel
def _to_bfloat16(value: float) -> Any:
    bits = _bits_of(value)
    if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
        return np.uint16(np.uint32(bits >> np.uint32(16)) | np.uint32(64))  # not a number, and stays so
    odd = np.uint32((bits >> np.uint32(16)) & np.uint32(1))  # ties go to the even one
    return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


@kernel
def _accumulate_widened(total: Any, part: Any, count: int, operation: int, float16: bool) -> None:
    wide = np.empty(BLOCK, np.float32)
    if float16:
        for i in range(count):
            wide[i] = _float16(part[i])
    else:
        for i in range(count):
            wide[i] = _bfloat16(part[i])
    if operation < 0:
        for i in range(count):
            total[i] = wide[i]
    else:
        _accumulate(total, wide, count, operation)


@kernel
def _halves(
    target: Any, second: int, sources: Any, ranks: int, count: int, operation: int, room: Any, float16: bool
) -> None:
    total, parts = carray(room, BLOCK), carray(sources, ranks)
    for start in range(0, count, BLOCK):
        length, offset = min(BLOCK, count - start), start * 2
        for rank in range(ranks):
            part = carray(_pointer(parts[rank] + offset, target), BLOCK)
            _accumulate_widened(total, part, length, operation if rank else -1, float16)
        if operation == AVG:
            for i in range(length):
                total[i] /= np.float32(ranks)
        result = carray(_pointer(_address(target) + offset, target), BLOCK)
        if float16:
            for i in range(length):
                result[i] = _half_of(total[i])
        else:
            for i in range(length):
                result[i] = _to_bfloat16(total[i])
        if second:
            copy(second + offset, _address(target) + offset, length * 2)


def _float16s(target: Any, second: int, sources: Any, ranks: int, count: int, operation: int, room: Any) -> None:
    _halves(target, second, sources, ranks, count, operation, room, True)


def _bfloat16s(target: Any, second: int, sources: Any, ranks: int, count: int, operation: int, room: Any) -> None:
    _halves(target, second, sources, ranks, count, operation, room, False)


_KERNELS: dict[torch.dtype, tuple[Any, Any, Any]] = {
    torch.float32: (_floats, types.float32, types.float32),
    torch.float64: (_floats, types.float64, types.float64),
    torch.float16: (_float16s, types.uint16, types.float32),
    torch.bfloat16: (_bfloat16s, types.uint16, types.float32),
    torch.int8: (_integers, types.int8, types.int8),
    torch.uint8: (_integers, types.uint8, types.uint8),
    torch.bool: (_integers, types.uint8, types.uint8),
    torch.int32: (_integers, types.int32, types.int32),
    torch.int64: (_integers, types.int64, types.int64),
}
# True + True is true: what adds or multiplies, of truth values, is "or" and "and".
_OF_BOOL = {SUM: BOR, PRODUCT: BAND, MIN: BAND, MAX: BOR}


def reduction(dtype: torch.dtype, operation: str) -> tuple[int, int]:
    """The address of the compiled function and the number of the operation that it takes.

    Raises UsageError for what cannot be reduced that way. The first call for a dtype compiles, which is kept on disk.
    """
    if dtype not in _KERNELS:
        raise UsageError(f"tensors of {dtype} cannot be reduced", remedy=f"Use one of {', '.join(map(str, _KERNELS))}.")
    number = OPERATIONS[operation]
    if dtype.is_floating_point and number in _BITWISE:
        raise UsageError(f"{operation} needs integers, not {dtype}", remedy="Convert the tensor first.")
    if not dtype.is_floating_point and number == AVG:
        raise UsageError(f"the mean of {dtype} is no {dtype}", remedy="Convert the tensor first, or sum.")
    if dtype is torch.bool:
        number = _OF_BOOL.get(number, number)
    return _compiled(dtype).address, number


@cache
def _compiled(dtype: torch.dtype) -> Any:
    body, element, room = _KERNELS[dtype]
    word = types.int64
    signature = types.void(types.CPointer(element), word, types.CPointer(word), word, word, word, types.CPointer(room))
    # One process at a time: numba numbers what it keeps of a function, and two that keep code for different dtypes at
    # once may choose the same number, so that a later process would be given the code of the other dtype.
    with open(__file__) as file:
        with contextlib.suppress(OSError):  # network file systems lock only what is open for writing
            fcntl.flock(file, fcntl.LOCK_EX)
        return callback(signature, body)
