"""The trainers of parameter server training: gradients go to the servers, weights and rows come back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tricorn.ps.client import Ack
from tricorn.ps.lookup import Ahead
from tricorn.ps.rows import RowGradients, Wanted
from tricorn.ps.versions import Versions, foresees
from tricorn.ps.worker import Worker
from tricorn.state.gradient import check_finite, clip_factor, schedule_factor, squared_norm
from tricorn.state.shards import Piece
from tricorn.strategy import Batch, Context, Outcome, Seat, Wishes, even_share

if TYPE_CHECKING:
    from tricorn.ps.client import Reading


class BspTrainer(Worker):
    """Fulfils ``tricorn.strategy.Trainer``: all workers contribute to each step, and it is applied once decided.

    The weights of a step are pulled when it begins, together with the rows that its batch needs.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        # Buffers that a forward changes are here only; the servers have the weights. Rank 0 saves its own for all.
        self.part = "buffers" if context.rank == 0 and next(self._flat.module.buffers(), None) is not None else None
        self._step: int | None = None  # the step that the buffers belong to: all before it are decided
        self._buffers_before: tuple[int, list[Tensor]] = (-1, [])  # a step, and the buffers it began with
        self._versions: Versions | None = None  # of this membership epoch
        self.foresees = bool(self._tables) and foresees(context.plan)

    def held(self) -> int | None:
        """The step of the buffers that only rank 0 has, if the model has any.

        The servers can go on from it unless another worker has pulled the weights of a step whose decision never
        reached this one: then they are a step ahead, and the run goes back to a checkpoint.
        """
        return self._step if self.part else None

    def join(self, seat: Seat) -> None:
        if seat.source != "keep":
            self._step, self._buffers_before = None, (-1, [])  # nothing is held until the new buffers are whole
        super().join(seat)
        step, buffers = self._buffers_before
        if seat.source == "keep" and seat.step == step:
            for buffer, before in zip(self._flat.module.buffers(), buffers, strict=True):
                buffer.copy_(before)
        # A step that is decided but not applied everywhere is applied by this pull.
        self._versions = Versions(self._context.plan, self._client, self._weights_N, seat.step)
        if ack := self._client.status(seat.step - 1):
            self._decided(seat.step - 1, ack)
        self._step = seat.step
        self._pull()

    def share(self, samples: int) -> tuple[int, int]:
        return even_share(samples, self._context.rank, self._context.plan.workers)

    def step(self, step: int, batch: Batch, samples: int, wishes: Wishes) -> Outcome:
        assert step == self._step
        self._buffers_before = (step, [buffer.clone() for buffer in self._flat.module.buffers()])
        ahead = self._ahead(step, batch)
        assert self._versions
        bases = self._versions.fetch(ahead, self._foreseen.values())
        self._flat.weights_N.copy_(self._weights_N)
        loss_sum, rows = self._gradient(batch, ahead)
        status = (loss_sum, batch.count, batch.samples, *wishes)
        with self._pushing():
            ack = self._client.push_sum(step, status, self._grads_N, rows, bases=bases)
        self._decided(step, ack)
        return Outcome.of(ack.status)

    def evaluate(self, batch: Batch, samples: int, judge: Callable[[Any, Batch], None]) -> None:
        self._pull()
        super().evaluate(batch, samples, judge)

    def pieces(self) -> Sequence[Piece]:
        """Rank 0 has the servers save the weights of this step, and adds the buffers, which they do not have."""
        if self._context.rank != 0:
            return []
        assert self._step is not None
        self._pull()
        self._client.snapshot(self._step)
        return self._flat.buffer_pieces()

    def _decided(self, step: int, ack: Ack) -> None:
        check_finite(step, Outcome.of(ack.status))
        assert self._versions
        self._versions.decided(step + 1, (clip_factor(self._job, ack.squared_norm), schedule_factor(self._job, step)))
        self._step = step + 1

    def _pull(self) -> None:
        """Have the weights of this step here."""
        assert self._versions
        if self._versions.pull():
            self._flat.weights_N.copy_(self._weights_N)


class AsyncTrainer(Worker):
    """Fulfils ``tricorn.strategy.LeasedTrainer``: each worker turns whole batches into updates by itself.

    Where the next batch is known, one round trip brings this one's gradients to the servers and the weights and rows
    for the next back. It is awaited when the next step begins: meanwhile the batch after that is prepared.
    """

    foresees = True

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._versions: list[int] = []  # by server, of the weights this worker has
        self._coming: tuple[Ahead, Reading] | None = None  # weights and rows on their way, and what they are for

    def join(self, seat: Seat) -> None:
        super().join(seat)
        self.refresh()

    def share(self, samples: int) -> tuple[int, int]:
        return 0, samples

    def step(self, step: int, batch: Batch, samples: int, wishes: Wishes) -> Outcome:
        ahead, factor = self._ahead(step, batch), schedule_factor(self._job, step)
        coming, self._coming = self._coming, None
        if coming and coming[0] is ahead:
            self._versions = coming[1].wait()
            self._flat.weights_N.copy_(self._weights_N)
        else:
            self._pull(ahead.wanted)
        outcome, rows = self._mean_gradient(step, batch, ahead, wishes)
        following = next(iter(self._foreseen.values()), None)
        if following is not None and self._context.plan.stale != "drop":
            with self._pushing():
                reading = self._client.ask_push_pull(
                    step, self._versions, self._grads_N, rows, self._weights_N, following.wanted, factor=factor
                )
                if self._feedback:
                    reading.wait()
            self._coming = following, reading
            return outcome
        with self._pushing():
            pushed = self._client.push(step, self._versions, self._grads_N, rows, factor=factor)
        if pushed.refused:  # as too old: computed once more from new weights, and then taken whatever its age
            ahead = self._lookups.ahead(batch.inputs)
            self._pull(ahead.wanted)
            outcome, rows = self._mean_gradient(step, batch, ahead, wishes)
            self._client.push(step, self._versions, self._grads_N, rows, factor=factor, any_age=True)
        return outcome

    def refresh(self) -> None:
        self._pull(peek=True)

    def idle(self) -> None:
        self._client.idle()

    def pieces(self) -> Sequence[Piece]:
        """Nothing: the servers save the state, when the coordinator has let all work come to rest."""
        return []

    def _mean_gradient(
        self, step: int, batch: Batch, ahead: Ahead, wishes: Wishes
    ) -> tuple[Outcome, list[RowGradients]]:
        """Fill ``_grads_N`` with the clipped mean gradient of the batch; also returns those of rows."""
        loss_sum, rows = self._gradient(batch, ahead)
        outcome = Outcome(loss_sum, batch.count, batch.samples, wishes)
        check_finite(step, outcome)
        gradients = [self._grads_N, *(row.grads_UD for row in rows)]
        for gradient in gradients:
            gradient.div_(max(batch.count, 1))
        if self._job.clip_norm is not None:
            factor = clip_factor(self._job, sum(squared_norm(gradient.view(-1)) for gradient in gradients))
            for gradient in gradients:
                gradient.mul_(factor)
        return outcome, rows

    def _pull(self, wanted: Sequence[Wanted] = (), *, peek: bool = False) -> None:
        self._coming = None
        self._versions = self._client.pull(self._weights_N, wanted, peek=peek)
        self._flat.weights_N.copy_(self._weights_N)
