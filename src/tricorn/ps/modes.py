"""What a server does with the requests of its workers: in agreed steps (BSP), or each at once (SSP, ASP).

A mode is asked three things of a request, in this order: is it time for it (``ready``), where does its payload go
(``room``, None to throw it away), and, with the payload there, what follows (``handle``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

from tricorn.control.intervals import Intervals
from tricorn.errors import ProtocolError
from tricorn.ps.consistency import Bsp, Clocks, Verdict
from tricorn.ps.table import Table
from tricorn.ps.wire import DUPLICATE, PEEK, Header, Op, as_bytes
from tricorn.state.gradient import squared_norm
from tricorn.state.shards import Piece


class Outlet(Protocol):
    """What a mode needs of the world."""

    def send(self, rank: int, header: Header, payload: memoryview | None = None) -> None:
        """Answer the worker of that rank, if it is still there. The payload is read while it is sent."""

    def before_update(self) -> None:
        """The weights are about to change: keep a copy of what is not sent yet."""

    def snapshot_taken(self, step: int, pieces: list[Piece]) -> None:
        """These are copies of the state of that step, for a checkpoint."""


class _Mode:
    def __init__(self, table: Table, outlet: Outlet) -> None:
        self.table = table
        self._outlet = outlet
        self._gradients: dict[int, Tensor] = {}  # by rank: the receive buffers, S elements each

    def _gradient_S(self, rank: int) -> Tensor:
        if rank not in self._gradients:
            self._gradients[rank] = self.table.empty()
        return self._gradients[rank]

    def _check_length(self, request: Header) -> None:
        due = self.table.description.bytes if request.op == Op.PUSH else 0
        if request.length != due:
            raise ProtocolError(f"a request {Op(request.op).name} of {request.length} bytes where {due} are due")

    def _send_weights(self, rank: int, version: int) -> None:
        self._outlet.send(rank, Header(Op.WEIGHTS, version=version), as_bytes(self.table.weights_S))


class Synchronous(_Mode):
    """BSP: gradient sums of all ranks are added in rank order, so the result does not depend on who was faster."""

    def __init__(self, table: Table, outlet: Outlet, *, workers: int, step: int) -> None:
        super().__init__(table, outlet)
        self._workers = workers
        self._bsp = Bsp(workers, step)
        self._statuses: dict[int, tuple[float, ...]] = {}
        self._acks: dict[int, Header] = {}  # of the last two complete steps

    def steps(self) -> list[int]:
        return self._bsp.steps()

    def begin(self, step: int, workers: int) -> None:
        """Go on with other workers; a complete sum that leads to ``step`` stays pending."""
        self._bsp.begin(step, workers)
        self._workers = workers
        self._gradients = {rank: gradient for rank, gradient in self._gradients.items() if rank < workers}

    def ready(self, rank: int, request: Header) -> bool:
        return request.op != Op.PUSH or self._bsp.judge(request.step, rank) is not Verdict.WAIT

    def room(self, rank: int, request: Header) -> memoryview | None:
        self._check_length(request)
        if request.op != Op.PUSH:
            return memoryview(b"")
        if self._bsp.judge(request.step, rank) is Verdict.TAKE:
            return as_bytes(self._gradient_S(rank))
        return None

    def handle(self, rank: int, request: Header) -> None:
        match request.op:
            case Op.PUSH:
                self._push(rank, request)
            case Op.PULL:
                self._pull(rank, request)
            case Op.STATUS:
                ack = self._acks.get(request.step)
                self._outlet.send(rank, ack or Header(Op.DONE, version=self._bsp.version))
            case Op.SNAPSHOT:
                if rank != 0 or request.step != self._bsp.version:
                    raise ProtocolError(f"rank {rank} wants a snapshot of step {request.step}, not {self._bsp.version}")
                self._outlet.snapshot_taken(request.step, self.table.pieces())
                self._outlet.send(rank, Header(Op.DONE, version=self._bsp.version))
            case _:
                raise ProtocolError("synchronous steps have no clocks to leave")

    def leave(self, rank: int) -> None:
        """A lost worker's contribution counts: it may have been seen as part of a complete step elsewhere."""

    def _push(self, rank: int, request: Header) -> None:
        if self._bsp.judge(request.step, rank) is Verdict.TAKE:
            self._statuses[rank] = request.numbers[:5]
            if self._bsp.contribute(rank):
                self._complete(request.step)
        elif request.step in self._acks:
            self._outlet.send(rank, self._acks[request.step])
        else:
            raise ProtocolError(f"step {request.step} is in the weights since before this server began")

    def _complete(self, step: int) -> None:
        ranks = range(self._workers)
        status = tuple(sum(column) for column in zip(*(self._statuses[rank] for rank in ranks), strict=True))
        mean_S = self._gradients[0]  # free for the sum: rank 0 does not push again before it is applied
        for rank in ranks[1:]:
            mean_S.add_(self._gradients[rank])
        mean_S.div_(max(status[1], 1.0))
        ack = Header(Op.ACK, step=step, version=step, numbers=(*status, squared_norm(mean_S)))
        self._acks = {known: header for known, header in self._acks.items() if known == step - 1} | {step: ack}
        for rank in ranks:
            self._outlet.send(rank, ack)

    def _pull(self, rank: int, request: Header) -> None:
        scale, lr = request.numbers[:2]
        if self._bsp.pull(request.version):
            self._outlet.before_update()
            mean_S = self._gradients[0]
            if scale != 1.0:
                mean_S.mul_(scale)
            self.table.update(mean_S, step=request.version, lr=lr)
        self._send_weights(rank, request.version)


class Asynchronous(_Mode):
    """SSP and ASP: a gradient is applied when it arrives, each step once; reads wait where the clocks say so."""

    def __init__(
        self, table: Table, outlet: Outlet, *, step: int, generation: int, applied: Iterable[tuple[int, int]]
    ) -> None:
        super().__init__(table, outlet)
        self.version = step
        self.fresh: list[int] = []  # applied, but not reported yet
        self.staleness: Counter[int] = Counter()
        self._generation = generation
        self.applied = Intervals(applied)
        self._clocks = self._new_clocks()

    def steps(self) -> list[int]:
        return [self._generation]

    def begin(self, step: int, workers: int) -> None:
        """Go on with other workers, whose clocks all begin anew."""
        self._gradients = {rank: gradient for rank, gradient in self._gradients.items() if rank < workers}
        self._clocks = self._new_clocks()

    def ready(self, rank: int, request: Header) -> bool:
        if request.op != Op.PULL or request.flags & PEEK:
            return True
        self._clocks.wake(rank)
        return self._clocks.may_read(rank)

    def room(self, rank: int, request: Header) -> memoryview | None:
        self._check_length(request)
        if request.op != Op.PUSH:
            return memoryview(b"")
        if request.step < 0 or not 0 <= request.version <= self.version:
            raise ProtocolError(f"a push of step {request.step} from version {request.version} of {self.version}")
        return None if request.step in self.applied else as_bytes(self._gradient_S(rank))

    def handle(self, rank: int, request: Header) -> None:
        match request.op:
            case Op.PUSH:
                self._push(rank, request)
            case Op.PULL:
                self._send_weights(rank, self.version)
            case Op.IDLE:
                self._clocks.idle(rank)
                self._outlet.send(rank, Header(Op.DONE, version=self.version))
            case _:
                raise ProtocolError("only synchronous steps have a status and snapshots by request")

    def leave(self, rank: int) -> None:
        self._clocks.leave(rank)

    def _push(self, rank: int, request: Header) -> None:
        new = self.applied.add(request.step)
        if new:
            self._outlet.before_update()
            self.staleness[self.version - request.version] += 1
            self.version += 1
            self.table.update(self._gradients[rank], step=self.version, lr=request.numbers[0])
            self.fresh.append(request.step)
        self._clocks.push(rank)
        flags = 0 if new else DUPLICATE
        self._outlet.send(rank, Header(Op.PUSHED, step=request.step, version=self.version, flags=flags))

    def _new_clocks(self) -> Clocks:
        description = self.table.description
        return Clocks(description.staleness if description.consistency == "ssp" else None)


Mode = Synchronous | Asynchronous


def new_mode(
    table: Table, outlet: Outlet, *, workers: int, step: int, generation: int, applied: Sequence[tuple[int, int]]
) -> Mode:
    if table.description.consistency == "bsp":
        return Synchronous(table, outlet, workers=workers, step=step)
    return Asynchronous(table, outlet, step=step, generation=generation, applied=applied)
