"""Tables on parameter servers, beside a dense part that workers train together.

A step's row gradients are at the servers, pushed by every worker, before any worker can agree on the step; they are
applied by the next pull, which only a worker that has agreed can send. So when somebody dies in between, either no
worker has agreed, and the servers drop the sum, or one has, and the servers can still be brought to its step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tricorn.ps.declared import Declared, given_rows
from tricorn.ps.line import Line
from tricorn.ps.lookup import Ahead, Lookups
from tricorn.ps.rows import Wanted
from tricorn.ps.versions import Versions, foresees
from tricorn.state.flat import WEIGHT_DTYPES
from tricorn.state.rows import row_tables

if TYPE_CHECKING:
    from tricorn.plan import Compression
    from tricorn.state.shards import Piece
    from tricorn.strategy import Context, Seat

_ROUNDINGS: tuple[Compression, ...] = ("bf16", "fp16", "int8")


class ServedTables:
    """Fulfils ``tricorn.strategy.Beside``."""

    alone = reads = False

    def __init__(self, context: Context) -> None:
        plan = context.plan
        self._context = context
        self.foresees = foresees(plan)
        # What leaves most of a gradient behind would need somebody to add it up, row by row.
        self._compress: Compression = plan.compress if plan.compress in _ROUNDINGS else "none"
        self._pushes = context.rank % plan.tensor == 0  # the shards of a layer all have the same row gradients
        self._dense = torch.empty(0, dtype=WEIGHT_DTYPES[context.job.precision])  # the servers have none
        self._rates = torch.ones(2, dtype=torch.float64)  # clipping's and the schedule's, of the step before this
        self._step = 0
        self._foreseen: dict[int, Ahead] = {}  # the step to come, and meanwhile this one
        self._bases: list[int] | None = None  # by server, the versions that this step's rows were read from
        self._line = Line()

    @property
    def bytes_sent(self) -> int:
        return self._line.bytes_sent

    def attach(self, model: nn.Module) -> None:
        self._tables = row_tables(self._context.job, model)
        # The servers want them in a run that begins.
        self._given = given_rows(model, self._tables) if self._context.rank == 0 else []
        self._lookups = Lookups(model, self._tables, self._read)

    def join(self, seat: Seat, ranks: Sequence[int], module: nn.Module) -> None:
        self.close()
        declared = Declared(self._context, (), self._tables)
        client = self._line.take(declared.client(seat, compress=self._compress))
        declared.connect(client, len(seat.servers), initial=lambda: self._dense, given=self._given)
        self._versions = Versions(self._context.plan, client, self._dense, seat.step)
        self._step = seat.step
        self.reads = bool(self._lookups.within(module))

    def carried(self) -> Tensor:
        return self._rates

    def foresee(self, step: int, parts: Sequence[Any]) -> None:
        self._foreseen[step] = self._lookups.ahead(*parts)

    def fetch(self, step: int, parts: Sequence[Any]) -> None:
        ahead = self._foreseen.pop(step, None) or self._lookups.ahead(*parts)
        self._decide()
        self._bases = self._versions.fetch(ahead, self._foreseen.values())
        self._lookups.begin(ahead)

    def hand_over(self, count: int) -> float:
        rows = self._lookups.end()
        ack = self._line.client.push_sum(
            self._step, (0.0, count, 0, 0, 0), self._dense, rows if self._pushes else [], bases=self._bases
        )
        if self._context.rank != 0 or self._context.job.clip_norm is None:
            return 0.0
        return ack.squared_norm * max(ack.status[1], 1.0) ** 2

    def commit(self, count: int, scale: float, factor: float) -> None:
        self._rates.copy_(torch.tensor([scale, factor], dtype=torch.float64))
        self._step += 1
        self._given = []

    def abandon(self) -> None:
        self._lookups.abandon()

    @contextmanager
    def judging(self, parts: Sequence[Any]) -> Iterator[None]:
        ahead = self._lookups.ahead(*parts)
        self._decide()
        self._versions.pull()
        self._read(ahead.wanted)
        self._lookups.begin(ahead, learning=False)
        try:
            yield
        finally:
            self._lookups.end()

    def pieces(self) -> Sequence[Piece]:
        """None: rank 0 has the servers save theirs."""
        if self._context.rank == 0:
            self._decide()
            self._versions.pull()
            self._line.client.snapshot(self._step)
        return []

    def interrupt(self) -> None:
        self._line.interrupt()

    def close(self) -> None:
        self._foreseen.clear()
        self._line.close()

    def _decide(self) -> None:
        """All steps before this one are agreed: the next pull has the last of them applied where it is not yet."""
        scale, factor = self._rates.tolist()
        self._versions.decided(self._step, (scale, factor))

    def _read(self, wanted: Sequence[Wanted]) -> list[int]:
        return self._line.client.read_rows(wanted) if wanted else []
