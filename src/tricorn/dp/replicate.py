"""A worker of data parallel training that holds a whole replica of the state."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from tricorn.comm.group import Group
from tricorn.dp.buckets import Tuner
from tricorn.dp.compress import gradient_sum
from tricorn.dp.direct import DirectSum
from tricorn.dp.worker import Worker
from tricorn.state.flat import FlatState, device_of
from tricorn.state.gradient import squared_norm
from tricorn.state.shards import Piece
from tricorn.state.whole_rows import open_checkpoint
from tricorn.strategy import Batch, Beside, Context, Seat


class ReplicaTrainer(Worker):
    """Fulfils ``tricorn.strategy.Trainer``. All replicas stay equal bit for bit."""

    _direct: DirectSum | None = None  # where all workers see the same memory

    def __init__(self, context: Context, beside: Beside | None = None) -> None:
        self.part: str | None = f"shard{context.rank}" if beside and beside.alone else "model"
        super().__init__(context, beside)

    def held(self) -> int | None:
        return self._state.step if self._whole else None

    def join(self, seat: Seat) -> None:
        group = self._connect(seat)
        if self._direct:
            self._direct.close()
            self._direct = None
        self._begin(seat)
        match seat.source:
            case "initial":
                self._whole = True
            case "checkpoint":
                assert seat.checkpoint is not None
                self._state.load(open_checkpoint(self._job, seat.checkpoint, seat.step))
                self._whole = True
            case "peer":
                self._copy(group, seat)
        if self._context.plan.compress == "none":
            self._choose(group)
        assert self.held() == seat.step, f"holds step {self.held()} where the seat says {seat.source} {seat.step}"

    def close(self) -> None:
        super().close()
        if self._direct:
            self._direct.release()

    def pieces(self) -> Sequence[Piece]:
        own = self._state.pieces() if self._context.rank == 0 else []
        return [*own, *self._beside.pieces()]

    def _build(self) -> nn.Module:
        self._untouched = True
        self._state = FlatState(self._new_model(), self._job.optimizer, device_of(self._job))
        self._sum = gradient_sum(self._state, self._context.plan.compress)
        return self._state.module

    def _choose(self, group: Group) -> None:
        """Sum gradients in shared memory where all workers see it, in buckets beside backward where not."""
        self._sum.agree(group, 0, filled=False)
        weights_N = self._state.weights_N
        exposed = group.expose(len(weights_N), weights_N.dtype) if weights_N.is_cpu else None
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
        return total + self._backward(last, self._direct.write if self._direct else None)

    def _finish_sum(self, status: Tensor) -> None:
        (self._direct or self._sum).finish(status)

    def _abandon(self) -> None:
        if self._direct:
            self._whole &= self._direct.abandon()
            self._untouched &= self._whole
        else:
            self._sum.abandon()

    def _waited(self) -> float:
        return super()._waited() + (self._direct.waited if self._direct else 0.0)

    def _squared_norm(self, group: Group) -> float:
        return self._direct.squared_norm() if self._direct else squared_norm(self._state.grads_N)

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
        for tensor in (*self._state.tensors().values(), *self._state.module.buffers(), self._beside.carried()):
            sent = tensor.contiguous()
            group.broadcast(sent, seat.peer)
            tensor.copy_(sent)
        self._state.grads_N.zero_()
        self._state.step = seat.step
        self._whole = True
