"""64-bit words in shared memory, given by their addresses: atomic access, waiting, and waking.

Every function is compiled, releases the GIL, and may be called from other compiled functions as well as from Python.
An address has to be a multiple of 8 inside memory that stays mapped during the call; nothing checks that.

Words count upwards and are written by one side; the other waits with ``wait_at_least``. A waiter first spins, which
answers within the time of a cache miss when the writer runs on another core; then yields, which lets the writer run
when it needs this core; then sleeps in the kernel (futex). The writer pays for a system call only if somebody
sleeps, which it learns from a second word, the *bell*. Each side writes one word and then reads the other's, with a
full fence between, so that at least one of the two sees the other:

    writer:  word = n;    fence; if bell: bell = 0, wake
    waiter:  bell = 1;    fence; if word < n: sleep while bell == 1

Only the writer clears a bell, so that several threads may sleep on the same one.
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tricorn.comm.kernel import kernel
from tricorn.errors import ClusterError

_FUTEXES = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221}  # of each machine: the system call's number
if platform.machine() not in _FUTEXES:
    raise ClusterError(
        f"memory cannot be shared on {platform.machine()}",
        remedy=f"Use a machine of {', '.join(_FUTEXES)}, with Linux.",
    )
_FUTEX = _FUTEXES[platform.machine()]
_WAIT, _WAKE = 0, 1
_I64 = ir.IntType(64)
_ADDRESS, _WORD = types.int64, types.int64


@intrinsic
def _load(typing: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(arguments[0], _I64.as_pointer()), "acquire", 8)

    return _WORD(_ADDRESS), generate


@intrinsic
def _store(typing: Any, address: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store_atomic(arguments[1], builder.inttoptr(arguments[0], _I64.as_pointer()), "release", 8)

    return types.void(_ADDRESS, _WORD), generate


@intrinsic
def _compare_exchange(typing: Any, address: Any, expected: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _I64.as_pointer())
        return builder.extract_value(builder.cmpxchg(pointer, arguments[1], arguments[2], "seq_cst"), 0)

    return _WORD(_ADDRESS, _WORD, _WORD), generate


@intrinsic
def _fence(typing: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")

    return types.void(), generate


@intrinsic
def _pause(typing: Any) -> Any:
    """Tell the core that this is a spinning loop, so that it leaves the memory and the other hyperthread alone."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if platform.machine() == "x86_64":
            hint = builder.module.declare_intrinsic("llvm.x86.sse2.pause", (), ir.FunctionType(ir.VoidType(), ()))
            builder.call(hint, ())

    return types.void(), generate


@intrinsic
def _yield(typing: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = ir.FunctionType(ir.IntType(32), ())
        builder.call(cgutils.get_or_insert_function(builder.module, function, "sched_yield"), ())

    return types.void(), generate


@intrinsic
def _futex(typing: Any, address: Any, operation: Any, value: Any, nanoseconds: Any) -> Any:
    """syscall(SYS_futex, address, operation, value, {0, nanoseconds}): of the word's lower half, as Linux has it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, operation, value, nanoseconds = arguments
        span = cgutils.alloca_once(builder, ir.ArrayType(_I64, 2))
        billion = ir.Constant(_I64, 1_000_000_000)
        builder.store(builder.udiv(nanoseconds, billion), cgutils.gep(builder, span, 0, 0))
        builder.store(builder.urem(nanoseconds, billion), cgutils.gep(builder, span, 0, 1))
        syscall = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_I64, [_I64], var_arg=True), "syscall")
        number, timeout = ir.Constant(_I64, _FUTEX), builder.ptrtoint(span, _I64)
        return builder.call(syscall, [number, address, operation, value, timeout])

    return types.int64(_ADDRESS, types.int64, types.int64, types.int64), generate


@kernel
def load(address: int) -> Any:
    """The word. What its writer wrote before it is visible to the caller (acquire)."""
    return _load(address)


@kernel
def store(address: int, value: int) -> None:
    """Set the word, after all that was written before (release)."""
    _store(address, value)


@kernel
def wake(bell: int) -> None:
    """Wake who sleeps on the bell; to be called after ``store``."""
    _fence()
    if _load(bell) != 0:
        _store(bell, 0)
        _futex(bell, _WAKE, 0x7FFFFFFF, 0)


@kernel
def wait_at_least(word: int, target: int, bell: int, spins: int, yields: int, nanoseconds: int) -> Any:
    """Wait until the word is at least the target; false if it is not after so many nanoseconds asleep.

    ``spins`` (about 40 ns each) and ``yields`` come first; the bell is the word that the writer wakes.
    """
    for _ in range(spins):
        if _load(word) >= target:
            return True
        _pause()
    for _ in range(yields):
        if _load(word) >= target:
            return True
        _yield()
    while True:
        _store(bell, 1)
        _fence()
        if _load(word) >= target:
            return True
        # 0 is a wake, of which any number may be stale; -1 a timeout, a signal, or a bell rung meanwhile.
        if _futex(bell, _WAIT, 1, nanoseconds) != 0 and _load(bell) == 1:
            return _load(word) >= target
