"""What a server does with the requests of its workers, as far as it is the same in all modes (docs/consistency.md).

A mode is asked three things of a request, in this order: is it time for it (``ready``), where does its payload go
(``room``, None to throw it away), and, with the payload there, what follows (``handle``). A payload is read where it
lies; a push's stays there until the same worker's next push.

Legend: S elements of this server's dense slice; U ids of one sparse table; D elements of a row.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from tricorn.errors import ProtocolError
from tricorn.ps.blocks import MAX_ROWS, Block, Ids, Kept, UnknownDigest, Writer, decoded, encoded_size, read_blocks
from tricorn.ps.table import Gradients, Table
from tricorn.ps.wire import ENCODING_SHIFT, IN_PLACE, ROWS_ALONE, Header, Op, as_bytes
from tricorn.state.shards import Piece

_BLOCK_BYTES = 32  # of what is not ids and rows, at most


class Outlet(Protocol):
    """What a mode needs of the world."""

    def send(self, rank: int, header: Header, parts: Sequence[memoryview] = ()) -> None:
        """Answer the worker of that rank, if it is still there. The payload, all parts, is read while it is sent."""

    def before_update(self) -> None:
        """The weights are about to change: keep a copy of what is not sent yet."""

    def snapshot_taken(self, step: int, pieces: list[Piece]) -> None:
        """These are copies of the state of that step, for a checkpoint."""


class Mode(ABC):
    """What Synchronous and Asynchronous have in common: where payloads lie, and how rows and weights are answered."""

    keeps_payloads = False  # whether a payload is used after its request was handled

    def __init__(self, table: Table, outlet: Outlet) -> None:
        self.table = table
        self._outlet = outlet
        self._dense_count = len(table.weights_S)
        self._itemsize = table.dtype.itemsize
        self._dense_bytes = self._dense_count * self._itemsize
        self.staleness: Counter[int] = Counter()  # of the weights and rows that gradients were computed from
        self._inboxes: dict[tuple[int, bool], memoryview] = {}  # by rank, and whether for pushes: where payloads go
        self.bytes_in_place = 0  # of weights that workers were let read where they lie
        self._kept: dict[int, Kept] = {}  # by rank: what its connection has sent

    def greet(self, rank: int) -> None:
        """A worker has connected, which is not known to have sent anything."""
        self._kept[rank] = Kept()

    @abstractmethod
    def steps(self) -> list[int]:
        """What a membership epoch could go on from: steps, or the one generation of an asynchronous run."""

    @abstractmethod
    def begin(self, step: int, workers: int) -> None:
        """Go on with other workers."""

    @abstractmethod
    def leave(self, rank: int) -> None:
        """The worker of that rank is gone."""

    @abstractmethod
    def ready(self, rank: int, request: Header) -> bool:
        """Whether it is time for this request."""

    @abstractmethod
    def room(self, rank: int, request: Header) -> memoryview | None:
        """Where its payload goes, None to throw it away. Raises ProtocolError for one that cannot be right."""

    def handle(self, rank: int, request: Header, payload: memoryview) -> None:
        try:
            self._handle(rank, request, payload)
        except UnknownDigest:
            self._outlet.send(rank, Header(Op.UNKNOWN, step=request.step))

    @abstractmethod
    def _handle(self, rank: int, request: Header, payload: memoryview) -> None: ...

    def answered(self, rank: int) -> bool:
        """Whether the request that was handled last has its answer; if not, it may have it now. Asked until it has."""
        return True

    @property
    def awaited(self) -> set[int]:
        """The workers without whom the requests of others are not answered."""
        return set()

    def _inbox(self, rank: int, request: Header) -> memoryview:
        """Room for the payload of a request, whose length is judged first."""
        self._check_length(request)
        key = rank, request.op in (Op.PUSH, Op.PUSH_PULL)
        inbox = self._inboxes.get(key)
        if inbox is None or len(inbox) < request.length:
            inbox = self._inboxes[key] = as_bytes(torch.empty(request.length, dtype=torch.uint8))
        return inbox[: request.length]

    def _check_length(self, request: Header) -> None:
        rows = MAX_ROWS + _BLOCK_BYTES * len(self.table.sparse) if self.table.sparse else 0
        match request.op:
            case Op.PUSH:
                least = self._dense_size(request)
            case Op.PUSH_PULL:
                least = self._dense_size(request)
                rows *= 2
            case Op.PULL | Op.ROWS:
                least = 0
            case _:
                least = rows = 0
        if not least <= request.length <= least + rows:
            due = f"{least} to {least + rows}" if rows else f"{least}"
            raise ProtocolError(f"a request {Op(request.op).name} of {request.length} bytes where {due} are due")

    @staticmethod
    def _check_finite(request: Header, numbers: Sequence[float]) -> None:
        """Raise ProtocolError for rates or counts that would make every weight NaN."""
        if not all(map(math.isfinite, numbers)):
            raise ProtocolError(
                f"a request {Op(request.op).name} with the numbers {tuple(numbers)}, which are not all finite",
                remedy="Give finite numbers; a schedule may not return inf or nan.",
            )

    def _dense_size(self, request: Header) -> int:
        if self._alone(request):
            return 0
        encoding = request.flags >> ENCODING_SHIFT
        return encoded_size(encoding, self._dense_count, self._itemsize) if encoding else self._dense_bytes

    def _alone(self, request: Header) -> bool:
        """Whether it speaks of rows only, since the dense part is with the workers."""
        return self.table.description.local_steps > 1 and bool(request.flags & ROWS_ALONE)

    def _blocks(self, rank: int, payload: memoryview, start: int, *lists: bool) -> list[list[Block]]:
        return read_blocks(payload, start, self.table.description.sparse, self._kept[rank], *lists)

    def _gradients(self, request: Header, payload: memoryview, blocks: Sequence[Block]) -> Gradients:
        """What a push brings; of the payload itself where nothing had to be decoded."""
        size, specs = self._dense_size(request), self.table.description.sparse
        encoding = 0 if self._alone(request) else request.flags >> ENCODING_SHIFT
        dense_S = decoded(payload[:size], encoding, self._dense_count, self.table.dtype)
        rows = []
        for block, spec in zip(blocks, specs, strict=True):
            elements = len(block.ids_U) * spec.dim
            flat = decoded(block.rows, block.encoding, elements, getattr(torch, spec.dtype))
            rows.append((block.ids_U, flat.view(-1, spec.dim)))
        return Gradients(dense_S, rows)

    def _answer_read(
        self, rank: int, request: Header, blocks: Sequence[Block], version: int, flags: int = 0
    ) -> list[tuple[Ids, Tensor]]:
        """Send the weights (not for ROWS) and rows that were asked for; returns the rows."""
        weights = request.op != Op.ROWS and not self._alone(request)
        if request.flags & IN_PLACE:
            self.bytes_in_place += self._dense_bytes * weights
            self._outlet.send(rank, Header(Op.WEIGHTS, version=version, flags=flags | IN_PLACE))
            return []
        found = [(block.ids_U, self.table.gather(index, block.ids_U)) for index, block in enumerate(blocks)]
        writer = Writer()
        if weights:
            writer.add(as_bytes(self.table.weights_S))
        for _, rows_UD in found:
            if len(rows_UD):
                writer.align()
                writer.add(as_bytes(rows_UD.flatten()))
        self._outlet.send(rank, Header(Op.WEIGHTS, version=version, flags=flags), writer.parts)
        return found
