"""What data parallel workers do alike, whatever part of the state they hold: a step, and agreeing on it."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tricorn.comm.group import Group
from tricorn.comm.peers import Peers
from tricorn.dp.balance import Balance, cut, share_sizes
from tricorn.dp.batchnorm import GlobalNorm, nothing
from tricorn.dp.buckets import Tuner
from tricorn.dp.buffers import Buffers
from tricorn.errors import Diverged
from tricorn.state.beside import WholeTables
from tricorn.state.flat import model_without_rows
from tricorn.state.gradient import check_finite, clip_factor, forward_backward, judge_share, learning_rate, portion
from tricorn.state.memory import give_back
from tricorn.state.shards import Piece
from tricorn.strategy import Batch, Beside, Context, Outcome, Seat, Wishes

_AGREED = 3 + len(Wishes())  # the numbers of the status that make an Outcome


class Worker(ABC):
    """Fulfils ``tricorn.strategy.Trainer``.

    An update is applied only when everything of its step is agreed; a step that fails leaves the state as it was.
    What is ``beside`` the state is trained with it, to the same steps.
    """

    def __init__(self, context: Context, beside: Beside | None = None) -> None:
        self._context = context
        self._job = context.job
        self._beside = beside or WholeTables(context.job)
        self._peers = Peers(context, "dp")
        self._norm_peers = Peers(context, "dp-norm")  # sums in the midst of computing, out of the gradients' way
        self._whole = False  # whether it is settled that what is here is the state of a step
        self._untouched = True  # whether these are still the weights of the seed
        self._balance = Balance(context.plan.workers)
        self._tuner: Tuner | None = None
        self._last: list[int] = []  # the samples of each in the last step, if there was one in this membership epoch
        self._busy = self._took = 0.0  # seconds of the last step: computing, and altogether
        self.computed = 0.0
        self._prepare(self._build())
        give_back()  # the weights lie in other memory now than those of the new model did

    @property
    def bytes_sent(self) -> int:
        return sum(peers.bytes_sent for peers in self._all_peers()) + self._beside.bytes_sent

    @property
    def foresees(self) -> bool:
        return self._beside.foresees

    def foresee(self, step: int, batch: Batch) -> None:
        self._beside.foresee(step, self._inputs(batch))

    def share(self, samples: int) -> tuple[int, int]:
        bounds = cut(self._balance.weights, samples)
        return bounds[self._context.rank], bounds[self._context.rank + 1]

    def step(self, step: int, batch: Batch, samples: int, wishes: Wishes) -> Outcome:
        group = self._peers.group
        assert step == self.held()
        began = time.perf_counter()
        shares = share_sizes(self._balance.weights, samples)
        self._buffers.begin()
        try:
            outcome, rows_square, changed, loads = self._agree(group, step, batch, shares, wishes)
            check_finite(step, outcome)
            self._buffers.spread(group, changed, first_of(shares))
            mean, scale = 1 / max(outcome.count, 1), 1.0
            if self._job.clip_norm is not None:
                scale = clip_factor(self._job, (self._squared_norm(group) + rows_square) * mean**2)
        except BaseException as error:
            if not isinstance(error, Diverged):  # of which all know
                for peers in self._all_peers():
                    peers.give_up()
            self._abandon()
            self._beside.abandon()
            self._buffers.restore()
            raise
        self._untouched = False
        computed, waited = time.perf_counter(), self._waited()
        self._update(mean * scale, learning_rate(self._job, step))
        self._beside.commit(outcome.count, scale, float(self._job.schedule(step)) if self._job.schedule else 1.0)
        self._busy += time.perf_counter() - computed - (self._waited() - waited)
        self._publish(group)
        self._took = time.perf_counter() - began
        self._last = loads
        return outcome

    def evaluate(self, batch: Batch, samples: int, judge: Callable[[Any, Batch], None]) -> None:
        with self._beside.judging([batch.inputs] if batch.samples else []):
            judge_share(self._job, self._module, batch, judge)

    def interrupt(self) -> None:
        for peers in self._all_peers():
            peers.interrupt()
        self._beside.interrupt()

    def close(self) -> None:
        for peers in self._all_peers():
            peers.leave()
        self._beside.close()

    @abstractmethod
    def held(self) -> int | None: ...

    @abstractmethod
    def join(self, seat: Seat) -> None: ...

    @abstractmethod
    def pieces(self) -> Sequence[Piece]: ...

    @abstractmethod
    def _build(self) -> nn.Module:
        """Make the state, with the weights of the seed; its module."""

    @abstractmethod
    def _add_up(self, group: Group, batch: Batch, shares: list[int]) -> float:
        """Run this worker's share, and begin to sum gradients over the group; the share's loss sum."""

    @abstractmethod
    def _finish_sum(self, status: Tensor) -> None:
        """Return when gradient and status are sums over the group."""

    @abstractmethod
    def _abandon(self) -> None:
        """The step has failed: leave the gradient alone, and clear it."""

    @abstractmethod
    def _squared_norm(self, group: Group) -> float:
        """The squared L2 norm of the summed gradient."""

    @abstractmethod
    def _update(self, factor: float, rate: float) -> None:
        """Apply the gradient times ``factor`` at that learning rate."""

    @abstractmethod
    def _publish(self, group: Group) -> None:
        """Let the others have what was updated, if they need it."""

    def _all_peers(self) -> list[Peers]:
        return [self._peers, self._norm_peers]

    def _prepare(self, module: nn.Module) -> None:
        self._module = module
        self._norm = GlobalNorm(module)
        self._buffers = Buffers(module)

    def _connect(self, seat: Seat) -> Group:
        """Meet the others, and begin like them without any knowledge of speeds."""
        group = self._peers.join(seat)
        if self._norm:
            self._norm_peers.join(seat)
        self._balance = Balance(group.size)
        self._tuner, self._last, self._busy, self._took = None, [], 0.0, 0.0
        return group

    def _begin(self, seat: Seat) -> None:
        """Have what is beside at the step of the seat, in a new model if this one has left the weights of the seed."""
        if seat.source == "initial" and not self._untouched:
            self._prepare(self._build())
        elif seat.source == "checkpoint":
            self._whole = self._untouched = False
        self._beside.join(seat, range(len(seat.workers)), self._module)

    def _new_model(self) -> nn.Module:
        """The job's model with the weights of its seed, but for what is beside it."""
        model = model_without_rows(self._job)
        self._beside.attach(model)
        return model

    def _agree(
        self, group: Group, step: int, batch: Batch, shares: list[int], wishes: Wishes
    ) -> tuple[Outcome, float, list[float], list[int]]:
        """Sum gradients, loss and wishes over all workers.

        Also the squared norm of the gradient of what is beside, which buffers changed, and how many samples each worker
        had: what was fetched ahead was cut by the weights of then.
        """
        if self._tuner is not None:
            self._tuner.begin(first_of(self._last))
        busy, loads = [0.0] * group.size, [0] * group.size
        busy[group.rank], loads[group.rank] = self._busy, batch.samples
        self._beside.fetch(step, self._inputs(batch))
        loss_sum = self._compute(group, batch, shares)
        rows_square = self._beside.hand_over(batch.count)
        status = torch.tensor(
            [
                *(loss_sum, batch.count, batch.samples, *wishes, rows_square, self._took),
                *(*busy, *loads, *self._buffers.changed()),
            ],
            dtype=torch.float64,
        )
        self._finish_sum(status)
        told = status.tolist()
        times = _AGREED + 2 + group.size
        rest = times + group.size
        self._hear(step, told[_AGREED + 1], told[_AGREED + 2 : times])
        return Outcome.of(told[:_AGREED]), told[_AGREED], told[rest:], [int(load) for load in told[times:rest]]

    def _compute(self, group: Group, batch: Batch, shares: list[int]) -> float:
        """Add up this worker's part of the gradient; its loss sum."""
        began, waited = time.perf_counter(), self._waited()
        if self._norm:
            self._norm.begin(self._norm_peers.group, present=sum(share > 0 for share in shares))
        loss_sum = self._add_up(group, batch, shares)
        if self._norm:
            self._norm.finish(here=batch.samples > 0)
        self._busy = time.perf_counter() - began - (self._waited() - waited)
        self.computed += self._busy
        return loss_sum

    def _backward(self, batch: Batch, before: Callable[[], None] | None = None) -> float:
        """Forward and backward; ``before`` is called between them."""
        if self._norm and batch.samples and not batch.count:
            torch.autograd.backward(nothing(self._job, self._module, batch))
            return 0.0
        return forward_backward(self._job, self._module, batch, before)

    def _waited(self) -> float:
        """Seconds for which computing has waited for peers, altogether."""
        return self._norm.waited

    def _parts(self, batch: Batch) -> list[Batch]:
        """The microbatches of a share: as many as the plan says or as there are samples, at least one."""
        count = max(1, min(self._context.plan.microbatches or 1, batch.samples))
        if count == 1:
            return [batch]
        edges = [batch.samples * part // count for part in range(count + 1)]
        return [portion(self._job, batch, start, stop) for start, stop in pairwise(edges)]

    def _inputs(self, batch: Batch) -> list[Any]:
        """What the model is called with, microbatch by microbatch."""
        return [part.inputs for part in self._parts(batch)] if batch.samples else []

    def _hear(self, step: int, took: float, busy: list[float]) -> None:
        """How long the last step took, summed over all workers, and how long each of them computed."""
        if not self._last:
            return
        notes = {"buckets": self._tuner.observe(took)} if self._tuner is not None else {}
        if self._context.plan.balance and self._balance.observe(self._last, busy):
            total = sum(self._balance.weights)
            notes["shares"] = {str(rank): weight / total for rank, weight in enumerate(self._balance.weights)}
        for what, values in notes.items():
            if values and self._context.rank == 0:
                self._context.measured(step, what, values)


def first_of(shares: Sequence[int]) -> int:
    """The first worker that has samples."""
    return next((rank for rank, samples in enumerate(shares) if samples), 0)
