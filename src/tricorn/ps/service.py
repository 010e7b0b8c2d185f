"""A server's side of the conversation with its workers, as generators that know no socket.

``converse`` yields the memory that the next bytes belong in, and None while the worker has to wait for others. Who
has a payload in memory already may send that in return instead of filling what was yielded.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from tricorn.errors import ClusterError, PeerLost, ProtocolError
from tricorn.ps import memory
from tricorn.ps.asynchronous import Asynchronous
from tricorn.ps.modes import Mode, Outlet
from tricorn.ps.synchronous import Synchronous
from tricorn.ps.table import Table, difference, read_description
from tricorn.ps.wire import HEADER, MAX_DOCUMENT, WANTED, Header, Op, as_bytes

Conversation = Generator[memoryview | None, memoryview | None, None]

HOT = 5  # ids of each table that statistics name
_MAX_LOAD = 16 << 20  # bytes of rows in one LOAD
_REQUESTS = frozenset(
    (Op.CREATE, Op.LOAD, Op.STATUS, Op.PUSH, Op.PULL, Op.SNAPSHOT, Op.IDLE, Op.ROWS, Op.BARRIER, Op.PUSH_PULL)
)
_nowhere = memoryview(bytearray(1 << 16))  # where bytes go that nobody wants


class Beginning(NamedTuple):
    """From where a membership epoch goes on; ``source`` is initial, keep or checkpoint.

    ``alone``: nobody regroups the workers when one is lost, so that the others have to be told.
    """

    epoch: int
    step: int
    source: str
    checkpoint: Path | None
    workers: int
    generation: int
    applied: Sequence[tuple[int, int]]
    alone: bool = False


class Service:
    """All that a server holds and does for its workers. Not thread-safe: it belongs to the server's loop.

    ``memory_limit``, in bytes, is for the rows of all sparse tables together; None means the machine's memory.
    """

    def __init__(self, outlet: Outlet, *, memory_limit: int | None = None) -> None:
        self._memory_limit = memory_limit
        self.beginning: Beginning | None = None  # None while no worker is welcome
        self.changed = False  # whether somebody who waits may have waited long enough
        self._outlet = outlet
        self._mode: Mode | None = None
        self._unloaded: Mode | None = None  # created, but still without its initial weights
        self._barriers = 0  # that all have passed
        self._at_barrier: set[int] = set()
        self._left: set[int] = set()  # ranks that were here in this epoch
        self._firsts = 0  # how often rank 0 has left
        self._between: set[int] = set()  # ranks whose next request has not begun
        self._open = False  # whether rank 0 of this epoch has said what is held

    def regroup(self) -> list[int]:
        """Stop serving; returns the steps (or the generation) this server could go on from."""
        self.beginning = None
        self._drop_unloaded()
        self._open = False
        return self._mode.steps() if self._mode else []

    def begin(self, beginning: Beginning) -> None:
        """Serve the workers of a new membership epoch. Raises ClusterError if there is nothing to keep."""
        if beginning.source != "keep":
            self._drop()  # its memory is free before the next is made
        elif self._mode is None:
            raise ClusterError("this server holds nothing that it could go on from")
        else:
            self._mode.begin(beginning.step, beginning.workers)
        self.beginning = beginning
        self._at_barrier.clear()
        self._left.clear()
        self.changed = True

    def close(self) -> None:
        """Give the memory back."""
        self._drop()
        self._drop_unloaded()

    def _drop(self) -> None:
        if self._mode:
            self._mode.table.close()
        self._mode = None

    def _drop_unloaded(self) -> None:
        if self._unloaded:
            self._unloaded.table.close()
        self._unloaded = None

    def snapshot(self, step: int) -> None:
        """Hand out copies of what is held, as the state of ``step``."""
        if self._mode is None:
            raise ClusterError("this server holds nothing that it could save")
        self._outlet.snapshot_taken(step, self._mode.table.pieces())

    def take_applied(self) -> list[int]:
        """The steps applied since this was last asked; always empty in synchronous steps."""
        if not isinstance(self._mode, Asynchronous):
            return []
        fresh, self._mode.fresh = self._mode.fresh, []
        return fresh

    @property
    def unreported(self) -> bool:
        return isinstance(self._mode, Asynchronous) and bool(self._mode.fresh)

    @property
    def applied(self) -> list[tuple[int, int]]:
        """All steps in the weights, as intervals; of synchronous steps the version says it."""
        return self._mode.applied.pairs if isinstance(self._mode, Asynchronous) else []

    @property
    def staleness(self) -> dict[int, int]:
        """How often a gradient was computed from weights so many versions old."""
        mode = self._mode  # read once: another thread may ask
        return dict(mode.staleness) if mode else {}

    def stats(self) -> dict[str, Any]:
        """What is held, and how old gradients were (docs/protocol.md)."""
        if self._mode is None:
            return {"dense": None, "tables": [], "staleness": {}, "bytes_in_place": 0}
        table = self._mode.table
        description = table.description
        dense = {
            "parameters": len(description.tables), "elements": description.stop - description.start,
            "bytes": sum(tensor.nbytes for tensor in table.tensors().values()), "consistency": description.consistency,
        }  # fmt: skip
        tables = [
            {"name": sparse.spec.name, "dim": sparse.spec.dim, "rows": sparse.rows, "bytes": sparse.nbytes,
             "consistency": description.row_consistency, "hot": sparse.hottest(HOT)}
            for sparse in table.sparse
        ]  # fmt: skip
        told = {"dense": dense, "tables": tables, "staleness": self.staleness}
        return told | {"bytes_in_place": self._mode.bytes_in_place}

    def places(self) -> bytes:
        """What workers of this host need to read parameters in place."""
        from tricorn.ps.places import Places

        assert self._mode
        table = self._mode.table
        tickets = tuple(sparse.ticket for sparse in table.sparse)
        return msgspec.json.encode(Places(weights=memory.ticket(table.weights_S), tables=tickets))

    def hot(self, rank: int) -> Asynchronous | None:
        """The mode, where what that worker asks next may be answered in machine code (hot.py)."""
        mode = self._mode if self._open and rank in self._between else None
        return mode if isinstance(mode, Asynchronous) and mode.is_hot(rank) else None

    def leave(self, rank: int) -> None:
        """The worker of that rank is gone."""
        self.changed = True
        self._between.discard(rank)
        self._at_barrier.discard(rank)
        self._left.add(rank)
        self._firsts += rank == 0
        if self._mode:
            self._mode.leave(rank)

    def converse(self, rank: int) -> Conversation:
        """Serve one worker for as long as it behaves; raises TricornError when it does not."""
        header = memoryview(bytearray(HEADER.size))
        greeted: Mode | None = None
        self._left.discard(rank)
        while True:
            self._between.add(rank)
            yield header
            self._between.discard(rank)
            request = Header.unpack(header)
            if request.op not in _REQUESTS:
                raise ProtocolError(f"there is no request of kind {request.op}")
            if request.op == Op.CREATE:
                yield from self._create(rank, request)
            elif request.op == Op.LOAD:
                yield from self._load(rank, request)
            elif request.op == Op.BARRIER:
                yield from self._barrier(rank, request)
            else:
                firsts = self._firsts
                while not (self._open and self._mode and self._mode.ready(rank, request)):
                    if self._mode:
                        self._check_there(self._mode.awaited)
                    else:
                        self._check_first(firsts)
                    yield None
                mode = self._mode
                if greeted is not mode:
                    mode.greet(rank)
                    greeted = mode
                room = mode.room(rank, request)
                if room is None:
                    yield from discard(request.length)
                    mode.handle(rank, request, memoryview(b""))
                else:
                    lent = yield room
                    if lent and mode.keeps_payloads:
                        room[:], lent = lent, None  # its owner may write to it before it is used
                    mode.handle(rank, request, lent or room)
                self.changed = True  # what was pushed may free others, though its own answer has to wait
                while not mode.answered(rank):
                    self._check_there(mode.awaited)
                    yield None
            self.changed = True

    def _check_first(self, before: int) -> None:
        """Raise PeerLost if rank 0 has left since, before it could say what is held. Its next life is waited for."""
        assert self.beginning
        if self.beginning.alone and self._firsts > before:
            raise PeerLost(
                "the client of rank 0 has left, and it had not said what is to be held",
                remedy="Start it again; then connect again.",
            )

    def _check_there(self, awaited: set[int]) -> None:
        """Raise PeerLost if somebody has left who is waited for, and whom nobody replaces."""
        if self.beginning and self.beginning.alone and (gone := awaited & self._left):
            ranks = f"ranks {sorted(gone)} have" if len(gone) > 1 else f"rank {min(gone)} has"
            raise PeerLost(
                f"the client of {ranks} left, and this one waits for it",
                remedy="Start it again under its rank; then connect again, and go on from the version that is pulled.",
            )

    def _barrier(self, rank: int, request: Header) -> Conversation:
        if request.length:
            raise ProtocolError("a barrier has no payload")
        assert self.beginning
        if isinstance(self._mode, Asynchronous):
            self._mode.idle(rank)  # who waits here holds nobody up who has further to go
            self.changed = True
        self._at_barrier.add(rank)
        number = self._barriers
        while number == self._barriers:
            if self._at_barrier | self._left >= {*range(self.beginning.workers)}:
                self._barriers += 1
                self._at_barrier.clear()
            else:
                yield None
        self._outlet.send(rank, Header(Op.DONE))

    def _create(self, rank: int, request: Header) -> Conversation:
        """What is to be held, from rank 0; the others are compared with it once it is there."""
        if request.length > MAX_DOCUMENT:
            raise ProtocolError(f"a description of {request.length} bytes is over the limit of {MAX_DOCUMENT}")
        room = memoryview(bytearray(request.length))
        description = read_description(bytes((yield room) or room))
        firsts = self._firsts
        while rank != 0 and not (self._open and self._mode):
            self._check_first(firsts)
            yield None
        if self._mode:
            if other := difference(self._mode.table.description, description):
                raise ProtocolError(other, remedy="Declare the same at all clients, or start other servers for it.")
        else:
            assert self.beginning
            self._drop_unloaded()  # of a worker that left before it brought the weights
            _, step, source, checkpoint, *_ = self.beginning
            table = Table(description, memory_limit=self._memory_limit)
            mode = _new_mode(table, self._outlet, self.beginning)
            if source == "initial":
                self._unloaded = mode
                self._outlet.send(rank, Header(Op.CREATED, flags=WANTED))
                return
            assert checkpoint
            try:
                table.load(checkpoint, step)
            except BaseException:
                table.close()
                raise
            self._mode = mode
        self._open = True
        self._outlet.send(rank, Header(Op.CREATED))

    def _load(self, rank: int, request: Header) -> Conversation:
        """Initial weights: rows of sparse table ``step`` - 1 from ``version`` on, or, at last, the dense slice."""
        mode = self._unloaded
        if rank != 0 or mode is None:
            raise ProtocolError(f"initial weights from rank {rank}, which are not due")
        if request.step:
            yield from self._load_rows(mode.table, request)
        elif request.length != (due := mode.table.description.bytes):
            raise ProtocolError(f"{request.length} bytes of initial weights, where {due} are due")
        else:
            weights = as_bytes(mode.table.weights_S)
            if given := (yield weights):
                weights[:] = given
            self._mode, self._unloaded, self._open = mode, None, True
        self._outlet.send(rank, Header(Op.DONE))

    @staticmethod
    def _load_rows(table: Table, request: Header) -> Conversation:
        if not 1 <= request.step <= len(table.sparse):
            raise ProtocolError(f"there is no sparse table {request.step - 1}, only {len(table.sparse)}")
        spec = table.description.sparse[request.step - 1]
        dtype = np.dtype(spec.dtype)
        rows, rest = divmod(request.length, spec.dim * dtype.itemsize)
        if rest or request.length > _MAX_LOAD or not 0 <= request.version <= spec.prefilled - rows:
            raise ProtocolError(
                f"{request.length} bytes for the rows of table {spec.name!r} from {request.version} on, "
                f"which has {spec.prefilled} of {spec.dim * dtype.itemsize} bytes"
            )
        room = memoryview(bytearray(request.length))
        weights_RD = np.frombuffer((yield room) or room, dtype).reshape(rows, spec.dim)
        table.sparse[request.step - 1].fill(request.version, weights_RD)


def _new_mode(table: Table, outlet: Outlet, beginning: Beginning) -> Mode:
    step = beginning.step
    if table.description.consistency == "bsp":
        return Synchronous(table, outlet, workers=beginning.workers, step=step, alone=beginning.alone)
    return Asynchronous(table, outlet, step=step, generation=beginning.generation, applied=beginning.applied)


def discard(count: int) -> Conversation:
    """Read that many bytes and forget them."""
    while count:
        part = _nowhere[:count]
        yield part
        count -= len(part)
