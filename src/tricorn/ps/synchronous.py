"""Agreed steps (BSP): what all workers push is added up, and applied when a pull proves that all servers have it.

Legend: S elements of this server's dense slice; N ids of all workers and U of them without repetition; D elements of a
row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tricorn.errors import Diverged, ProtocolError, TableFull, TricornError
from tricorn.ps.blocks import Ids
from tricorn.ps.consistency import Bsp, Verdict, row_bound
from tricorn.ps.modes import Mode, Outlet
from tricorn.ps.table import Gradients, Table
from tricorn.ps.wire import PEEK, VOID, Header, Op, encode_error
from tricorn.state.gradient import squared_norm


class Synchronous(Mode):
    """BSP: gradient sums of all ranks are added in rank order, so the result does not depend on who was faster.

    Where rows are read with less consistency, they are still written step by step, with the dense part.
    """

    keeps_payloads = True

    def __init__(self, table: Table, outlet: Outlet, *, workers: int, step: int, alone: bool = False) -> None:
        super().__init__(table, outlet)
        self._by_themselves = alone
        self._workers = workers
        self._bsp = Bsp(workers, step, table.description.local_steps)
        self._whole = True  # whether the dense part is of the same step as the rows
        self._sums: dict[int, Gradients] = {}  # by rank, of the step at hand
        self._mean: Gradients | None = None  # of the complete step
        self._waiting: set[int] = set()  # ranks whose push of that step has no answer yet
        self._statuses: dict[int, tuple[float, ...]] = {}
        self._acks: dict[int, tuple[Header, bytes]] = {}  # of the last two complete steps, in their order
        self._failure: TricornError | None = None  # why the complete step cannot be applied

    def steps(self) -> list[int]:
        held = self._bsp.steps()
        ends = [self._whole, self._mean is not None and self._has_dense(self._mean)]
        return [step for step, whole in zip(held, ends, strict=False) if whole]

    def begin(self, step: int, workers: int) -> None:
        """Go on with other workers; a complete sum that leads to ``step`` stays pending."""
        self._bsp.begin(step, workers)
        self._workers = workers
        self._sums.clear()
        self._waiting.clear()
        self._kept.clear()
        if not self._bsp.complete:
            self._mean = self._failure = None
        # A pending mean lies in the inbox of rank 0, or in memory of its own.
        self._inboxes = {key: inbox for key, inbox in self._inboxes.items() if key[0] < workers}

    def ready(self, rank: int, request: Header) -> bool:
        return request.op != Op.PUSH or self._bsp.judge(request.step, rank) is not Verdict.WAIT

    def room(self, rank: int, request: Header) -> memoryview | None:
        self._check_length(request)
        if request.op == Op.PULL:
            self._check_finite(request, request.numbers[:2])
        if request.op == Op.PUSH:
            self._check_finite(request, request.numbers[1:])  # the loss comes first: workers judge it
        if request.op == Op.PUSH and self._bsp.judge(request.step, rank) is not Verdict.TAKE:
            return None
        return self._inbox(rank, request)

    def answered(self, rank: int) -> bool:
        return not self._by_themselves or rank not in self._waiting  # where nobody regroups, who waits hears of a loss

    @property
    def awaited(self) -> set[int]:
        return self._bsp.missing

    def leave(self, rank: int) -> None:
        """A lost worker's contribution counts: it may have been seen as part of a complete step elsewhere."""
        self._waiting.discard(rank)

    def _handle(self, rank: int, request: Header, payload: memoryview) -> None:
        match request.op:
            case Op.PUSH:
                self._push(rank, request, payload)
            case Op.PULL:
                self._pull(rank, request, payload)
            case Op.ROWS:
                self._read_rows(rank, request, payload)
            case Op.STATUS:
                if request.step in self._acks:
                    self._acknowledge(rank, request.step)
                else:
                    self._outlet.send(rank, Header(Op.DONE, version=self._bsp.version))
            case Op.SNAPSHOT:
                if rank != 0 or request.step != self._bsp.version or not self._whole:
                    raise ProtocolError(f"rank {rank} wants a snapshot of step {request.step}, not {self._bsp.version}")
                self._outlet.snapshot_taken(request.step, self.table.pieces())
                self._outlet.send(rank, Header(Op.DONE, version=self._bsp.version))
            case _:
                raise ProtocolError(f"synchronous steps have no clocks, so no {Op(request.op).name}")

    def _push(self, rank: int, request: Header, payload: memoryview) -> None:
        if self._bsp.judge(request.step, rank) is Verdict.TAKE:
            (blocks,) = self._blocks(rank, payload, self._dense_size(request), True)
            gradients = self._gradients(request, payload, blocks)
            self.table.check_buckets(gradients)
            if any(len(other.dense_S) != len(gradients.dense_S) for other in self._sums.values()):
                raise ProtocolError(f"step {request.step} with a dense part from some workers and without from others")
            self._sums[rank] = gradients
            self._waiting.add(rank)
            self._statuses[rank] = request.numbers
            if self.table.description.row_consistency != "bsp":
                self.staleness[max(0, request.step - request.version)] += 1
            if self._bsp.contribute(request.step, rank):
                self._complete(request.step)
        elif request.step in self._acks:
            self._acknowledge(rank, request.step)
        else:
            raise ProtocolError(f"step {request.step} is in the weights since before this server began")

    def _complete(self, step: int) -> None:
        ranks = range(self._workers)
        status = tuple(sum(column) for column in zip(*(self._statuses[rank] for rank in ranks), strict=True))
        self._mean = mean([self._sums[rank] for rank in ranks], status[1], status[5] or status[1])
        self._sums.clear()
        norm = sum(squared_norm(flat) for flat in self._mean.flats())
        self._failure = self._unfit(step, self._mean, norm)
        # Whether a gradient is finite, workers see by the norm; of room each server only knows its own.
        against = encode_error(self._failure) if isinstance(self._failure, TableFull) else b""
        ack = Header(Op.ACK, step=step, version=step, numbers=(*status[:5], norm))
        self._acks = dict([*self._acks.items()][-1:]) | {step: (ack, against)}
        for rank in self._waiting:
            self._acknowledge(rank, step)
        self._waiting.clear()

    def _unfit(self, step: int, mean: Gradients, norm: float) -> Diverged | TableFull | None:
        if not math.isfinite(norm):
            return Diverged(f"the gradient of step {step} is not finite")
        try:
            self.table.check_room(mean)
        except TableFull as error:
            return error
        return None

    def _acknowledge(self, rank: int, step: int) -> None:
        ack, against = self._acks[step]
        self._outlet.send(rank, ack, [memoryview(against)] if against else ())

    def _pull(self, rank: int, request: Header, payload: memoryview) -> None:
        if self._bsp.pull(request.version):
            if not request.flags & VOID:
                try:
                    self._apply(request)
                except TricornError as error:
                    self._failure = error
                    raise
            self._mean = self._failure = None
            self._bsp.advance()
        (blocks,) = self._blocks(rank, payload, 0, False)
        self._answer_read(rank, request, blocks, request.version)

    def _apply(self, request: Header) -> None:
        scale, factor = request.numbers[:2]
        if self._failure:
            raise self._failure
        assert self._mean
        self._outlet.before_update()
        if scale != 1.0:
            for flat in self._mean.flats():
                flat.mul_(scale)
        self.table.update(self._mean, step=request.version, factor=factor)
        self._whole = self._has_dense(self._mean)

    def _has_dense(self, gradients: Gradients) -> bool:
        return len(gradients.dense_S) == self._dense_count

    def _read_rows(self, rank: int, request: Header, payload: memoryview) -> None:
        description = self.table.description
        bound = row_bound(description.row_consistency, description.staleness)
        needed = request.version + request.step
        if bound is not None and not request.flags & PEEK and needed - bound > self._bsp.version:
            raise ProtocolError(
                f"rows for version {needed}, at most {bound} old, are asked for before version {needed - bound} is "
                "pulled"
            )
        (blocks,) = self._blocks(rank, payload, 0, False)
        self._answer_read(rank, request, blocks, self._bsp.version)


def mean(sums: Sequence[Gradients], count: float, row_count: float) -> Gradients:
    """The sum of all ranks' gradients, in their order, divided by the counts; the first one's memory is used up."""
    dense_S = sums[0].dense_S
    for other in sums[1:]:
        dense_S.add_(other.dense_S)
    dense_S.div_(max(count, 1.0))
    return Gradients(dense_S, [_mean_rows(same, row_count) for same in zip(*(each.rows for each in sums), strict=True)])


def _mean_rows(parts: Sequence[tuple[Ids, Tensor]], count: float) -> tuple[Ids, Tensor]:
    if not any(len(ids_U) for ids_U, _ in parts):
        return parts[0]
    from tricorn.ps.sparse.ids import sum_rows, unique

    ids_U, inverse_N = unique(np.concatenate([ids for ids, _ in parts]))
    grads_ND = torch.cat([grads for _, grads in parts])
    sum_UD = grads_ND.new_empty(len(ids_U), grads_ND.shape[1])
    sum_rows(inverse_N, grads_ND.numpy(), sum_UD.numpy())
    return ids_U, sum_UD.div_(max(count, 1.0))
