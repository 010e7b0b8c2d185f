"""Local updates: each worker trains the dense part by itself for a round, and servers add up how far all went.

Rows are not copied to workers for a round, which see too few of them: their gradients are pushed and applied in every
step, with the job's own optimizer, as without local steps. So does Baidu for click-through models (Zhao et al. 2022,
k-step merging). Within a round the servers then hold rows that are newer than the dense part, from which no run can go
on: what is lost there goes back to a checkpoint. Without tables it goes back to the beginning of the round.

Legend: N elements of all dense parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tricorn.ps.declared import Declared, given_rows, new_feedback
from tricorn.ps.line import Line
from tricorn.ps.lookup import Ahead, Lookups
from tricorn.ps.rows import RowGradients, Wanted
from tricorn.ps.versions import Versions, foresees
from tricorn.state.flat import FlatState, device_of, fill, flat_pieces, model_without_rows
from tricorn.state.gradient import check_finite, forward_backward, schedule_factor
from tricorn.state.rows import row_tables
from tricorn.state.shards import CheckpointReader, Piece
from tricorn.strategy import Batch, Context, Outcome, Seat
from tricorn.worker.rounds import OUTER, RoundTrainer

if TYPE_CHECKING:
    from tricorn.comm.group import Group


class LocalTrainer(RoundTrainer):
    """Fulfils ``tricorn.strategy.Trainer``. The servers have the weights that a round began with, and the outer step.

    Their version is the number of steps in those weights, or in the rows if there are any.
    """

    part: str | None = "local"

    def __init__(self, context: Context) -> None:
        self._line = Line()
        self._foreseen: dict[int, Ahead] = {}  # the step to come, and meanwhile this one
        self._given: list[Tensor | None]  # the rows that the model has, as long as servers may want them
        super().__init__(context, "ps")
        self.foresees = bool(self._tables) and foresees(context.plan)

    @property
    def bytes_sent(self) -> int:
        return self._line.bytes_sent + super().bytes_sent

    def join(self, seat: Seat) -> None:
        self._foreseen.clear()
        self._line.close()
        super().join(seat)
        outer = OUTER[self._context.plan.outer]
        declared = Declared(self._context, self._state.entries, self._tables, outer)
        # What an encoding lost is owed within one membership epoch: what is pushed again is pushed whole.
        compress = self._context.plan.compress
        client = declared.client(seat, compress=compress, feedback=new_feedback(compress, self._state.weights_N))
        declared.connect(
            self._line.take(client), len(seat.servers), initial=self._state.weights_N.cpu, given=self._given
        )
        self._given = []  # the servers have them now
        self._untouched = False
        self._versions = Versions(self._context.plan, client, None, seat.step)
        self._pull(seat.step)  # a round that is decided but not applied everywhere is applied by this
        self._keep()

    def foresee(self, step: int, batch: Batch) -> None:
        self._foreseen[step] = self._lookups.ahead(batch.inputs)

    def evaluate(self, batch: Batch, samples: int, judge: Callable[[Any, Batch], None]) -> None:
        ahead = self._lookups.ahead(batch.inputs)
        self._read(ahead.wanted)
        self._lookups.begin(ahead, learning=False)
        try:
            super().evaluate(batch, samples, judge)
        finally:
            self._lookups.end()

    def pieces(self) -> Sequence[Piece]:
        """Rank 0 has the servers save the weights, and adds the state of its own optimizer and the buffers."""
        if self._context.rank:
            return []
        self._line.client.snapshot(self._state.step)
        return flat_pieces(self._slots(), self._state.entries) + self._state.buffer_pieces()

    def interrupt(self) -> None:
        super().interrupt()
        self._line.interrupt()

    def close(self) -> None:
        self._line.close()
        super().close()

    def _build_state(self) -> FlatState:
        model = model_without_rows(self._job)
        self._tables = row_tables(self._job, model)
        self._given = given_rows(model, self._tables)
        self._lookups = Lookups(model, self._tables, self._read)
        self._rows: list[RowGradients] = []  # of the step at hand
        self._bases: list[int] | None = None  # by server, the versions that this step's rows were read from
        return FlatState(model, self._job.optimizer, device_of(self._job))

    def _gradient(self, step: int, batch: Batch) -> tuple[float, Sequence[Tensor]]:
        if not self._tables:
            return super()._gradient(step, batch)
        ahead = self._foreseen.pop(step, None) or self._lookups.ahead(batch.inputs)
        self._bases = self._versions.fetch(ahead, self._foreseen.values())
        self._lookups.begin(ahead)
        loss_sum = forward_backward(self._job, self._state.module, batch)
        self._rows = self._lookups.end()
        return loss_sum, [row.grads_UD for row in self._rows]

    def _between(self, step: int, count: int) -> None:
        if self._tables:
            self._push(step, (0.0, count, 0, 0, 0), None)
            self._versions.decided(step + 1, (1.0, schedule_factor(self._job, step)))

    def _meet(self, group: Group, step: int, count: int) -> Outcome:
        outcome = self._push(step, (*self._round, count), self._state.grads_N.cpu())
        check_finite(step, outcome)
        self._versions.decided(step + 1, (1.0, schedule_factor(self._job, step)))
        self._pull(step + 1)
        return outcome

    def _abandon(self) -> None:
        self._lookups.abandon()

    def _load(self, reader: CheckpointReader) -> None:
        state = self._state
        fill(reader, {"param": state.weights_N} | self._slots(), state.entries)
        state.load_buffers(reader)
        state.step = reader.step

    def _slots(self) -> dict[str, Tensor]:
        return {f"optim/{slot}": flat_N for slot, flat_N in self._state.slots.items()}

    def _push(self, step: int, status: Sequence[float], gradient_N: Tensor | None) -> Outcome:
        rows, self._rows = self._rows, []
        ack = self._line.client.push_sum(step, status, gradient_N, rows, bases=self._bases)
        return Outcome.of(ack.status)

    def _pull(self, version: int) -> None:
        """Have the weights of that version, which end a round, here."""
        weights_N = self._state.weights_N.cpu()  # on the CPU these are the weights themselves
        factor = schedule_factor(self._job, version - 1) if version else 1.0
        self._line.client.pull_version(version, weights_N, scale=1.0, factor=factor)
        self._state.weights_N.copy_(weights_N)

    def _read(self, wanted: Sequence[Wanted]) -> None:
        if wanted:
            self._line.client.read_rows(wanted)
