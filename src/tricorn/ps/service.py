"""A server's side of the conversation with its workers, as generators that know no socket.

``converse`` yields the memory that the next bytes belong in, and None while the worker has to wait for others.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import NamedTuple

from tricorn.errors import ClusterError, ProtocolError
from tricorn.ps.modes import Asynchronous, Mode, Outlet, new_mode
from tricorn.ps.table import Table, read_description
from tricorn.ps.wire import HEADER, MAX_DOCUMENT, WANTED, Header, Op, as_bytes

Conversation = Generator[memoryview | None, None, None]

_REQUESTS = frozenset((Op.CREATE, Op.LOAD, Op.STATUS, Op.PUSH, Op.PULL, Op.SNAPSHOT, Op.IDLE))
_nowhere = memoryview(bytearray(1 << 16))  # where bytes go that nobody wants


class Beginning(NamedTuple):
    """From where a membership epoch goes on; ``source`` is initial, keep or checkpoint."""

    epoch: int
    step: int
    source: str
    checkpoint: Path | None
    workers: int
    generation: int
    applied: Sequence[tuple[int, int]]


class Service:
    """All that a server holds and does for its workers. Not thread-safe: it belongs to the server's loop."""

    def __init__(self, outlet: Outlet) -> None:
        self.beginning: Beginning | None = None  # None while no worker is welcome
        self.changed = False  # whether somebody who waits may have waited long enough
        self._outlet = outlet
        self._mode: Mode | None = None
        self._unloaded: Mode | None = None  # created, but still without its initial weights
        self._open = False  # whether rank 0 of this epoch has said what is held

    def regroup(self) -> list[int]:
        """Stop serving; returns the steps (or the generation) this server could go on from."""
        self.beginning = self._unloaded = None
        self._open = False
        return self._mode.steps() if self._mode else []

    def begin(self, beginning: Beginning) -> None:
        """Serve the workers of a new membership epoch. Raises ClusterError if there is nothing to keep."""
        if beginning.source != "keep":
            self._mode = None  # its memory is free before the next is made
        elif self._mode is None:
            raise ClusterError("this server holds nothing that it could go on from")
        else:
            self._mode.begin(beginning.step, beginning.workers)
        self.beginning = beginning
        self.changed = True

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
        return dict(self._mode.staleness) if isinstance(self._mode, Asynchronous) else {}

    def leave(self, rank: int) -> None:
        """The worker of that rank is gone."""
        self.changed = True
        if self._mode:
            self._mode.leave(rank)

    def converse(self, rank: int) -> Conversation:
        """Serve one worker for as long as it behaves; raises TricornError when it does not."""
        header = memoryview(bytearray(HEADER.size))
        while True:
            yield header
            request = Header.unpack(header)
            if request.op not in _REQUESTS:
                raise ProtocolError(f"there is no request of kind {request.op}")
            if request.op == Op.CREATE:
                yield from self._create(rank, request)
            elif request.op == Op.LOAD:
                yield from self._load(rank, request)
            else:
                while not (self._open and self._mode and self._mode.ready(rank, request)):
                    yield None
                room = self._mode.room(rank, request)
                yield from discard(request.length) if room is None else (room,)
                self._mode.handle(rank, request)
            self.changed = True

    def _create(self, rank: int, request: Header) -> Conversation:
        if rank != 0 or request.length > MAX_DOCUMENT:
            raise ProtocolError(f"a description of {request.length} bytes from rank {rank}")
        document = bytearray(request.length)
        yield memoryview(document)
        description = read_description(document)
        if self._mode:
            if description != self._mode.table.description:
                raise ProtocolError("the tables are not those that this server holds")
        else:
            assert self.beginning
            _, step, source, checkpoint, workers, generation, applied = self.beginning
            mode = new_mode(
                Table(description), self._outlet, workers=workers, step=step, generation=generation, applied=applied
            )
            if source == "initial":
                self._unloaded = mode
                self._outlet.send(rank, Header(Op.CREATED, flags=WANTED))
                return
            assert checkpoint
            mode.table.load(checkpoint, step)
            self._mode = mode
        self._open = True
        self._outlet.send(rank, Header(Op.CREATED))

    def _load(self, rank: int, request: Header) -> Conversation:
        mode = self._unloaded
        if rank != 0 or mode is None or request.length != mode.table.description.bytes:
            raise ProtocolError(f"{request.length} bytes of initial weights from rank {rank}, which are not due")
        yield as_bytes(mode.table.weights_S)
        self._mode, self._unloaded, self._open = mode, None, True
        self._outlet.send(rank, Header(Op.DONE))


def discard(count: int) -> Conversation:
    """Read that many bytes and forget them."""
    while count:
        part = _nowhere[:count]
        yield part
        count -= len(part)
