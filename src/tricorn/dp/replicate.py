"""A worker of data parallel training that holds a whole replica of the state."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from tricorn.comm.group import Group
from tricorn.dp.buckets import Tuner
from tricorn.dp.compress import gradient_sum
from tricorn.dp.direct import DirectSum
from tricorn.dp.worker import Worker
from tricorn.state.flat import FlatState, build_model, device_of
from tricorn.state.gradient import clip_factor, squared_norm
from tricorn.state.shards import Piece
from tricorn.state.whole_rows import open_checkpoint
from tricorn.strategy import Batch, Outcome, Seat


class ReplicaTrainer(Worker):
    """Fulfils ``tricorn.strategy.Trainer``. All replicas stay equal bit for bit."""

    part: str | None = "model"
    _direct: DirectSum | None = None  # where all workers see the same memory

    def held(self) -> int | None:
        return self._state.step if self._whole else None

    def join(self, seat: Seat) -> None:
        group = self._connect(seat)
        if self._direct:
            self._direct.close()
            self._direct = None
        match seat.source:
            case "initial":
                if not self._untouched:
                    self._prepare(self._build())
                self._whole = True
            case "checkpoint":
                assert seat.checkpoint is not None
                self._whole = self._untouched = False
                self._state.load(open_checkpoint(self._job, seat.checkpoint, seat.step))
                self._whole = True
            case "peer":
                self._copy(group, seat)
        if self._context.plan.compress == "none":
            self._choose(group)
        assert self.held() == seat.step, f"holds step {self.held()} where the seat says {seat.source} {seat.step}"

    def pieces(self) -> Sequence[Piece]:
        return self._state.pieces() if self._context.rank == 0 else []

    def _build(self) -> nn.Module:
        self._untouched = True
        self._state = FlatState(build_model(self._job), self._job.optimizer, device_of(self._job))
        self._sum = gradient_sum(self._state, self._context.plan.compress)
        return self._state.module

    def _choose(self, group: Group) -> None:
        """Sum gradients in shared memory where all workers see it, in buckets beside backward where not."""
        self._sum.agree(group, 0, filled=False)
        weights_N = self._state.weights_N
        exposed = group.expose(2 * len(weights_N), weights_N.dtype) if weights_N.is_cpu else None
        if exposed:
            self._direct = DirectSum(self._state, group, exposed)
        else:
            self._tuner = Tuner(self._sum, group, self._state.grads_N.nbytes)

    def _add_up(self, group: Group, batch: Batch, shares: list[int]) -> float:
        *parts, last = self._parts(batch)
        total = sum(self._backward(part) for part in parts)
        if self._direct:
            self._direct.begin()
        else:
            self._sum.begin(group, batch.count)
        return total + self._backward(last)

    def _finish_sum(self, status: Tensor) -> None:
        (self._direct or self._sum).finish(status)

    def _abandon(self) -> None:
        (self._direct or self._sum).abandon()

    def _factor(self, group: Group, outcome: Outcome) -> float:
        factor = 1 / max(outcome.count, 1)
        if self._job.clip_norm is not None:
            square = self._direct.squared_norm() if self._direct else squared_norm(self._state.grads_N)
            factor *= clip_factor(self._job, square * factor**2)
        return factor

    def _update(self, factor: float, rate: float) -> None:
        if self._direct:
            self._direct.update(factor, rate)
        else:
            self._state.grads_N.mul_(factor)
            self._state.update(lr=rate)

    def _publish(self, group: Group) -> None:
        """All have made the same update."""

    def _copy(self, group: Group, seat: Seat) -> None:
        """Take the state from the peer that has it; those that have it too take part, so that no one needs to know."""
        if self.held() != seat.step:  # else what arrives is what is here, and a broken transfer breaks nothing
            self._whole = self._untouched = False
        self._sum.agree(group, seat.peer, filled=False)
        for tensor in (*self._state.tensors().values(), *self._state.module.buffers()):
            sent = tensor.contiguous()
            group.broadcast(sent, seat.peer)
            tensor.copy_(sent)
        self._state.grads_N.zero_()
        self._state.step = seat.step
        self._whole = True
