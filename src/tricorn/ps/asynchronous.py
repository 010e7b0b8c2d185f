"""Each push at once (SSP, ASP): every step is applied once, and reads wait where the clocks say so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from tricorn.control.intervals import Intervals
from tricorn.errors import ProtocolError
from tricorn.optim import SGD
from tricorn.ps.blocks import Block, UnknownDigest
from tricorn.ps.consistency import Clocks, row_bound
from tricorn.ps.drift import Sent
from tricorn.ps.memory import SMALLEST
from tricorn.ps.modes import Mode, Outlet
from tricorn.ps.table import Gradients, Table
from tricorn.ps.wire import ANY_AGE, DUPLICATE, IN_PLACE, PEEK, REFUSED, Header, Op

if TYPE_CHECKING:
    from tricorn.ps.hot import Served, Slice

_HOT = 32  # requests: the machine code has to be loaded
_MAX_PAIRS = 64  # intervals of applied steps


class Asynchronous(Mode):
    """SSP and ASP: a gradient is applied when it arrives, each step once; reads wait where the clocks say so."""

    def __init__(
        self, table: Table, outlet: Outlet, *, step: int, generation: int, applied: Iterable[tuple[int, int]]
    ) -> None:
        super().__init__(table, outlet)
        self.version = step
        self.fresh: list[int] = []  # applied, but not reported yet
        self._generation = generation
        self.applied = Intervals(applied)
        description = table.description
        # Dense parameters are bound by their own consistency; where there are tables, rows are read with them.
        dense = row_bound(description.consistency, description.staleness)
        self._row_bound = row_bound(description.row_consistency, description.staleness)
        bounds = [bound for bound in (dense, *[self._row_bound] * bool(table.sparse)) if bound is not None]
        self._bound = min(bounds, default=None)
        self._clocks = Clocks()
        self._sent: dict[int, Sent] = {}  # by rank, for delay compensation
        self._due: dict[int, tuple[Header, list[Block], int]] = {}  # by rank, what is read after its push, and flags
        self._plain = self._bound is None and description.stale == "keep" and _simple(table)
        self._asked: Counter[int] = Counter()  # by rank, PUSH_PULLs since it has connected
        self._slice: Slice | None = None

    def greet(self, rank: int) -> None:
        super().greet(rank)
        self._asked[rank] = 0

    def steps(self) -> list[int]:
        return [self._generation]

    def begin(self, step: int, workers: int) -> None:
        """Go on with other workers, whose clocks all begin anew."""
        self._inboxes = {key: inbox for key, inbox in self._inboxes.items() if key[0] < workers}
        self._clocks = Clocks()
        self._sent.clear()
        self._kept.clear()
        self._due.clear()

    def ready(self, rank: int, request: Header) -> bool:
        if request.op not in (Op.PULL, Op.ROWS) or request.flags & PEEK:
            return True
        self._clocks.wake(rank)
        if request.op == Op.PULL:
            return self._clocks.may_read(rank, self._bound)
        return self._clocks.may_read(rank, self._row_bound, ahead=request.step)

    def room(self, rank: int, request: Header) -> memoryview | None:
        self._check_length(request)
        if request.op in (Op.PUSH, Op.PUSH_PULL):
            if request.step < 0 or not 0 <= request.version <= self.version:
                raise ProtocolError(f"a push of step {request.step} from version {request.version} of {self.version}")
            self._check_finite(request, request.numbers[:1])
            if request.op == Op.PUSH and request.step in self.applied:
                return None
        return self._inbox(rank, request)

    def idle(self, rank: int) -> None:
        self._clocks.idle(rank)

    def leave(self, rank: int) -> None:
        self._clocks.leave(rank)
        self._due.pop(rank, None)

    def answered(self, rank: int) -> bool:
        if rank not in self._due:
            return True
        self._clocks.wake(rank)
        if not self._clocks.may_read(rank, self._bound):
            return False
        self._read(rank, *self._due.pop(rank))
        return True

    def _handle(self, rank: int, request: Header, payload: memoryview) -> None:
        match request.op:
            case Op.PUSH:
                self._push(rank, request, payload)
            case Op.PUSH_PULL:
                self._push_pull(rank, request, payload)
            case Op.PULL | Op.ROWS:
                (blocks,) = self._blocks(rank, payload, 0, False)
                self._read(rank, request, blocks)
            case Op.IDLE:
                self.idle(rank)
                self._outlet.send(rank, Header(Op.DONE, version=self.version))
            case _:
                raise ProtocolError("only synchronous steps have a status and snapshots by request")

    def _push(self, rank: int, request: Header, payload: memoryview) -> None:
        blocks: list[Block] = []
        if request.step not in self.applied:  # or there is no payload
            (blocks,) = self._blocks(rank, payload, self._dense_size(request), True)
        flags = self._take(rank, request, payload, blocks)
        self._outlet.send(rank, Header(Op.PUSHED, step=request.step, version=self.version, flags=flags))

    def _push_pull(self, rank: int, request: Header, payload: memoryview) -> None:
        # What is read is judged before anything is applied, so that the whole can be sent again.
        in_place = request.flags & IN_PLACE
        self._check_readable(request)
        lists = self._blocks(rank, payload, self._dense_size(request), True, *[False] * (not in_place))
        flags = self._take(rank, request, payload, lists[0])
        self._asked[rank] += 1
        self._due[rank] = request, [] if in_place else lists[1], flags

    def is_hot(self, rank: int) -> bool:
        """Whether ``serve`` is worth while: this worker has often asked, and applied steps are few intervals."""
        return self._plain and self._asked[rank] >= _HOT and len(self.applied.pairs) <= _MAX_PAIRS

    def serve(self, rank: int, serve: Callable[[Slice, int, Sequence[tuple[int, int]]], Served]) -> Served:
        """Have that worker's requests served from the dense slice; ``serve`` gets it, the version, and all steps."""
        if self._slice is None:
            from tricorn.ps.hot import Slice

            self._slice = Slice(self.table.weights_S, self.table.description.optimizer.lr)
        self._outlet.before_update()
        served = serve(self._slice, self.version, self.applied.pairs)
        for step, age in zip(served.steps, served.ages, strict=True):
            self.applied.add(step)
            self.staleness[age] += 1
            self.fresh.append(step)
            self._clocks.push(rank)
        self.version += len(served.log)
        return served

    def _take(self, rank: int, request: Header, payload: memoryview, blocks: Sequence[Block]) -> int:
        """Apply a push unless it is applied, or too old; returns the flags of the answer."""
        flags = 0
        if request.step in self.applied:
            flags = DUPLICATE
        elif self._too_old(request):
            flags = REFUSED
        else:
            self._apply(rank, request, self._gradients(request, payload, blocks))
        # What is pushed again because another server refused it is the same tick of the worker's clock.
        if not flags & REFUSED and not (flags & DUPLICATE and request.flags & ANY_AGE):
            self._clocks.push(rank)
        return flags

    def _apply(self, rank: int, request: Header, gradients: Gradients) -> None:
        description = self.table.description
        gradients.check_finite(request.step, [spec.name for spec in description.sparse])
        self._check_unique(gradients)
        if len(self.table.sparse) > 1:  # one judges itself
            self.table.check_buckets(gradients)
            self.table.check_room(gradients)
        age, factor = self.version - request.version, request.numbers[0]
        if description.stale == "scale":
            factor /= 1 + age
        elif description.stale == "compensate" and rank in self._sent:
            self._sent[rank].compensate(gradients, self.table, self._clocks.clocks.get(rank, 0))
        self._outlet.before_update()
        self.table.update(gradients, step=self.version + 1, factor=factor)
        self.version += 1
        self.applied.add(request.step)
        self.staleness[age] += 1
        self.fresh.append(request.step)

    def _check_unique(self, gradients: Gradients) -> None:
        """An optimizer would make two steps of one: raise ProtocolError for an id that comes twice."""
        for spec, (ids_U, _) in zip(self.table.description.sparse, gradients.rows, strict=True):
            if len(ids_U) > 1:
                from tricorn.ps.sparse.ids import first_repeated

                if (place := first_repeated(ids_U)) >= 0:
                    raise ProtocolError(
                        f"ids of table {spec.name!r} come twice: {ids_U[place]}",
                        remedy="Give each once, with the sum of its gradients.",
                    )

    def _too_old(self, request: Header) -> bool:
        description = self.table.description
        return (
            description.stale == "drop"
            and not request.flags & ANY_AGE
            and self.version - request.version > description.staleness
        )

    def _read(self, rank: int, request: Header, blocks: Sequence[Block], flags: int = 0) -> None:
        pushed = request.op == Op.PUSH_PULL
        if self.table.description.stale != "compensate" or (request.flags & PEEK and not pushed):
            self._answer_read(rank, request, blocks, self.version, flags)
            return
        self._check_readable(request)
        rows = self._answer_read(rank, request, blocks, self.version, flags)
        ahead = 0 if pushed else request.step
        sent = self._sent.setdefault(rank, Sent())
        sent.keep(self._clocks.clocks[rank] + ahead, rows, None if request.op == Op.ROWS else self.table)

    def _check_readable(self, request: Header) -> None:
        """Raise UnknownDigest for a read in place where gradients are compared with what was read."""
        if self.table.description.stale == "compensate" and request.flags & IN_PLACE:
            raise UnknownDigest


def _simple(table: Table) -> bool:
    """Whether there is nothing but a small slice that plain SGD changes."""
    description, optimizer = table.description, table.description.optimizer
    plain = isinstance(optimizer, SGD) and not optimizer.momentum and not optimizer.weight_decay
    return plain and not table.sparse and 0 < description.bytes < SMALLEST
