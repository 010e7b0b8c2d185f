"""A dense PUSH_PULL answered in machine code, for a small slice under plain SGD: the request, the update, the reply.

In Python such a request takes 50 us of a server, here 3. What is not exactly what is expected here is left to Python,
unread; so is all bookkeeping but the number of versions, from a log of what was done.

Legend: S elements of the server's dense slice; L places of the log.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from tricorn.comm import words
from tricorn.comm.kernel import kernel
from tricorn.ps.ring import CAPACITY, Side, give_back, publish
from tricorn.ps.sparse.kernel import fma
from tricorn.ps.wire import HEADER, IN_PLACE, Header, Op

if TYPE_CHECKING:
    from torch import Tensor

AT_ONCE = 16  # requests, after which others have their turn
_HEAD = HEADER.size
_RECORD = 24  # bytes of a descriptor of the ring
_PUSH_PULL = int(Op.PUSH_PULL)
_DONTWAIT, _NOSIGNAL = 0x40, 0x4000
_STEP, _AGE, _NANOSECONDS = 0, 1, 2  # columns of the log
_I64 = ir.IntType(64)

Bytes = NDArray[np.uint8]
Log = NDArray[np.int64]  # [L, 3]; applied steps [., 2] are intervals [start, stop)


def _of_sockets(name: str) -> Any:
    """``recv`` or ``send`` of the C library: descriptor, address, size, flags; -1 for every error."""

    @intrinsic
    def call(typing: Any, descriptor: Any, address: Any, size: Any, flags: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_I64, [_I64] * 4), name)
            return builder.call(function, arguments)

        return types.int64(*[types.int64] * 4), generate

    return call


_recv, _send = _of_sockets("recv"), _of_sockets("send")


@intrinsic
def _poll(typing: Any, one: Any, other: Any, milliseconds: Any) -> Any:
    """Wait until one of two descriptors can be read: 1 and 2, added where both can; 0 where none can, or a signal."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        # struct pollfd: descriptor (32), events (16), revents (16); POLLIN is 1.
        polled = cgutils.alloca_once(builder, ir.ArrayType(_I64, 2))
        lower, event = ir.Constant(_I64, 0xFFFFFFFF), ir.Constant(_I64, 1 << 32)
        for place, descriptor in enumerate(arguments[:2]):
            word = builder.or_(builder.and_(descriptor, lower), event)
            builder.store(word, cgutils.gep(builder, polled, 0, place))
        kind = ir.FunctionType(ir.IntType(32), [_I64, _I64, ir.IntType(32)])
        function = cgutils.get_or_insert_function(builder.module, kind, "poll")
        timeout = builder.trunc(arguments[2], ir.IntType(32))
        builder.call(function, [builder.ptrtoint(polled, _I64), ir.Constant(_I64, 2), timeout])
        found = []
        for place in range(2):
            word = builder.load(cgutils.gep(builder, polled, 0, place))
            ready = builder.icmp_unsigned("!=", builder.lshr(word, ir.Constant(_I64, 48)), ir.Constant(_I64, 0))
            found.append(builder.shl(builder.zext(ready, _I64), ir.Constant(_I64, place)))
        return builder.or_(*found)

    return types.int64(types.int64, types.int64, types.int64), generate


@intrinsic
def _nanoseconds(typing: Any) -> Any:
    """A monotonic clock."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        span = cgutils.alloca_once(builder, ir.ArrayType(_I64, 2))
        kind = ir.FunctionType(ir.IntType(32), [ir.IntType(32), _I64])
        function = cgutils.get_or_insert_function(builder.module, kind, "clock_gettime")
        builder.call(function, [ir.Constant(ir.IntType(32), 1), builder.ptrtoint(span, _I64)])
        seconds, rest = (builder.load(cgutils.gep(builder, span, 0, place)) for place in range(2))
        return builder.add(builder.mul(seconds, ir.Constant(_I64, 1_000_000_000)), rest)

    return types.int64(), generate


@kernel
def _read_word(raw: Bytes, at: int) -> Any:
    word = np.int64(0)
    for byte in range(8):
        word = (word << 8) | np.int64(raw[at + byte])
    return word


@kernel
def _write_word(raw: Bytes, at: int, word: int) -> None:
    for byte in range(8):
        raw[at + byte] = (word >> (56 - 8 * byte)) & 255


@kernel
def _expected(raw: Bytes, flags: int, length: int) -> Any:
    return raw[0] == _PUSH_PULL and raw[1] == flags and _read_word(raw, 72) == length


@kernel
def _apply(
    raw: Bytes, grads_S: Any, weights_S: Any, lr: float, version: int, applied: Log, log: Log, count: int
) -> Any:
    """Whether the update could be made: the step is new, its version was, and every number is finite."""
    step, base = _read_word(raw, 8), _read_word(raw, 16)
    if step < 0 or not 0 <= base <= version:
        return False
    for pair in range(len(applied)):
        if applied[pair, 0] <= step < applied[pair, 1]:
            return False
    for place in range(count):
        if log[place, _STEP] == step:
            return False
    zero = weights_S.dtype.type(0)
    for s in range(len(grads_S)):
        if grads_S[s] * zero != zero:
            return False
    bits = np.empty(1, np.int64)
    bits[0] = _read_word(raw, 24)
    rate = weights_S.dtype.type(-(lr * bits.view(np.float64)[0]))
    if rate * zero != zero:
        return False
    for s in range(len(grads_S)):
        weights_S[s] = fma(rate, grads_S[s], weights_S[s])
    log[count, _STEP] = step
    log[count, _AGE] = version - base
    return True


@kernel
def _serve_socket(
    descriptor: int, others: int, address: int, buffer: Bytes, got: int, grads_S: Any, weights_S: Any, lr: float,
    version: int, applied: Log, log: Log, reply: Bytes, reply_address: int, values: Any, milliseconds: int,
) -> Any:  # fmt: skip
    """(requests served, bytes of the next one, bytes of the last reply that are sent)."""
    size, count = len(reply), 0
    while True:
        while got < size:
            if (got or count) and _poll(descriptor, others, milliseconds) & 1 == 0:
                return count, got, size
            done = _recv(descriptor, address + got, size - got, _DONTWAIT)
            if done <= 0:
                return count, got, size
            got += done
            if got >= _HEAD and not _expected(buffer, 0, size - _HEAD):
                return count, got, size
        began = _nanoseconds()
        if not _apply(buffer, grads_S, weights_S, lr, version + count, applied, log, count):
            return count, got, size
        got = 0
        _write_word(reply, 16, version + count + 1)
        values[:] = weights_S
        sent = _send(descriptor, reply_address, size, _DONTWAIT | _NOSIGNAL)
        log[count, _NANOSECONDS] = _nanoseconds() - began
        count += 1
        if sent < size or count == len(log):
            return count, got, max(sent, 0)


@kernel
def _serve_ring(
    requests: Bytes, replies: Bytes, places: NDArray[np.int64], state: NDArray[np.int64], buffer: Bytes, grads_S: Any,
    weights_S: Any, lr: float, version: int, applied: Log, log: Log, reply: Bytes, spins: int, yields: int,
) -> Any:  # fmt: skip
    """(requests served, whether the worker is owed a byte). Places: of the words; state: in, out, and known of out."""
    head_in, tail_in, head_out, tail_out, bell = places
    size, count, rung = len(buffer), 0, False
    whole = _RECORD + ((size + 7) & ~7)
    while count < len(log) and not rung:
        turn = 0
        while words._load(head_in) == state[0]:
            turn += 1
            if turn > spins + yields:
                return count, rung
            if turn > spins:
                words._yield()
            else:
                words._pause()
        began = _nanoseconds()
        at = state[0] % CAPACITY
        if words._load(head_in) - state[0] < whole:
            break
        record = requests[at : at + _RECORD + size]
        if record[0] != 1 or _little(record, 8) != size:
            break
        for byte in range(size):  # the worker may write to its memory while this goes on
            buffer[byte] = record[_RECORD + byte]
        if state[1] + _RECORD + _HEAD - state[2] > CAPACITY:
            state[2] = words._load(tail_out)
            if state[1] + _RECORD + _HEAD - state[2] > CAPACITY:
                break
        if not _expected(buffer, IN_PLACE, size - _HEAD):
            break
        if not _apply(buffer, grads_S, weights_S, lr, version + count, applied, log, count):
            break
        before = state[0]
        state[0] += whole
        rung |= give_back(tail_in, state[0], bell, head_in, before)
        _write_word(reply, _RECORD + 16, version + count + 1)
        at = state[1] % CAPACITY
        replies[at : at + len(reply)] = reply
        state[1] += len(reply)
        rung |= publish(head_out, state[1], bell)
        log[count, _NANOSECONDS] = _nanoseconds() - began
        count += 1
    return count, rung


@kernel
def _little(raw: Bytes, at: int) -> Any:
    word = np.int64(0)
    for byte in range(8):
        word |= np.int64(raw[at + byte]) << (8 * byte)
    return word


class Served(NamedTuple):
    """What was done: [steps, ages, nanoseconds of each]."""

    log: Log

    @property
    def steps(self) -> list[int]:
        return [int(step) for step in self.log[:, _STEP]]

    @property
    def ages(self) -> list[int]:
        return [int(age) for age in self.log[:, _AGE]]

    @property
    def seconds(self) -> list[float]:
        return [float(nanoseconds) * 1e-9 for nanoseconds in self.log[:, _NANOSECONDS]]


class Slice:
    """A server's dense slice of S elements, of float32 or float64, where plain SGD at the rate ``lr`` changes it."""

    def __init__(self, weights_S: Tensor, lr: float) -> None:
        self._weights_S = weights_S.numpy()
        self._lr = lr
        size = _HEAD + self._weights_S.nbytes
        self._buffer = np.zeros(size, np.uint8)
        self._grads_S = self._buffer[_HEAD:].view(self._weights_S.dtype)
        self._log = np.zeros((AT_ONCE, 3), np.int64)
        self._reply = np.zeros(size, np.uint8)
        self._reply[:_HEAD] = np.frombuffer(Header(Op.WEIGHTS, length=size - _HEAD).pack(), np.uint8)
        self._values_S = self._reply[_HEAD:].view(self._weights_S.dtype)
        self._record = np.zeros(_RECORD + _HEAD, np.uint8)
        self._record[0], self._record[8] = 1, _HEAD
        self._record[_RECORD:] = np.frombuffer(Header(Op.WEIGHTS, flags=IN_PLACE).pack(), np.uint8)

    def serve_socket(
        self, descriptor: int, others: int, version: int, applied: Sequence[tuple[int, int]], milliseconds: int
    ) -> tuple[Served, memoryview, memoryview]:
        """Serve what comes by a socket until something else comes, or can be read from ``others``.

        Also returns what was read of the next request, and what could not be sent of the last reply.
        """
        buffer, reply = self._buffer, self._reply
        count, got, sent = _serve_socket(
            descriptor, others, buffer.ctypes.data, buffer, 0, self._grads_S, self._weights_S, self._lr, version,
            _pairs(applied), self._log, reply, reply.ctypes.data, self._values_S, milliseconds,
        )  # fmt: skip
        return Served(self._log[:count]), buffer[:got].data, reply[sent:].data

    def serve_ring(
        self, side: Side, version: int, applied: Sequence[tuple[int, int]], spins: int, yields: int
    ) -> Served:
        """Serve what comes through shared memory, as long as it comes soon and is nothing else."""
        reader, writer = side.reader, side.writer
        places = np.array([*reader.words, *writer.words, writer.bell], np.int64)
        state = np.array([reader.settle(), writer.head, writer.tail], np.int64)
        count, rung = _serve_ring(
            reader.ring, writer.ring, places, state, self._buffer, self._grads_S, self._weights_S, self._lr, version,
            _pairs(applied), self._log, self._record, spins, yields,
        )  # fmt: skip
        reader.go_on(int(state[0]))
        writer.head, writer.tail = int(state[1]), int(state[2])
        writer.rung |= bool(rung)
        return Served(self._log[:count])


def _pairs(applied: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    return np.array(applied, np.int64).reshape(-1, 2)
