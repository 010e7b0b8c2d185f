"""A worker of data parallel training that holds a share of the state (ZeRO, Rajbhandari et al. 2020).

Every worker updates its own part of the weights. What is spread grows with ``plan.zero``: 1 the optimizer's state, 2
also gradients, 3 also weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tricorn.comm.group import Group
from tricorn.comm.peers import Peers
from tricorn.dp.balance import share_sizes
from tricorn.dp.batchnorm import nothing
from tricorn.dp.shard_gather import Gatherer
from tricorn.dp.shard_sum import ShardSum
from tricorn.dp.shard_units import Unit, blocks, runs
from tricorn.dp.worker import Worker, first_of
from tricorn.state import flat
from tricorn.state.gradient import forward, loss_sum, squared_norm
from tricorn.state.memory import give_back
from tricorn.state.shards import CheckpointReader, Piece
from tricorn.state.whole_rows import open_checkpoint
from tricorn.strategy import Batch, Beside, Context, Seat


class ShardTrainer(Worker):
    """Fulfils ``tricorn.strategy.Trainer``. Nobody else has this worker's part: if it is lost, a checkpoint has it."""

    def __init__(self, context: Context, beside: Beside | None = None) -> None:
        self.part: str | None = f"shard{context.rank}"
        self._zero = context.plan.zero
        self._gather_peers = Peers(context, "dp-gather")
        super().__init__(context, beside)

    def held(self) -> int | None:
        return self._step if self._whole else None

    def join(self, seat: Seat) -> None:
        group = self._connect(seat)
        self._gather_peers.join(seat)
        self._begin(seat)
        if seat.source == "initial":
            self._whole = True
        elif seat.source == "checkpoint":
            assert seat.checkpoint is not None
            self._load(open_checkpoint(self._job, seat.checkpoint, seat.step))
            self._whole = True
        self._gather.join(self._gather_peers.group)
        self._publish(group)
        assert self.held() == seat.step, f"holds step {self.held()} where the seat says {seat.source} {seat.step}"

    def evaluate(self, batch: Batch, samples: int, judge: Callable[[Any, Batch], None]) -> None:
        self._gather.open()
        self._gather.begin("evaluate", first_of(share_sizes(self._balance.weights, samples)))
        try:
            super().evaluate(batch, samples, judge)
            self._gather.end()
        finally:
            self._gather.close()

    def pieces(self) -> Sequence[Piece]:
        give_back()  # who spreads the state is short of memory: the copies may take the place of what steps have freed
        buffers = flat.buffer_pieces(self._module) if self._context.rank == 0 else []
        own = [piece for unit in self._units for piece in unit.pieces()] + buffers
        return [*own, *self._beside.pieces()]

    def _build(self) -> nn.Module:
        self._untouched, self._step = True, 0
        module = self._new_model().to(flat.device_of(self._job))
        named = dict(flat.trained_parameters(module))

        def unit(names: Sequence[str]) -> Unit:
            return Unit(
                [(name, named[name]) for name in names], self._job.optimizer,
                rank=self._context.rank, workers=self._context.plan.workers, gathered=self._zero < 3,
            )  # fmt: skip

        if self._zero == 3:
            found, rest = blocks(module)
            held = [(block, unit(names)) for block, names in found]
            others = unit(rest) if rest else None
            self._gather = Gatherer(held, others)
            # Backward goes from the last block to the first, and has done with the others only at its end.
            self._units = [own for _, own in reversed(held)] + ([others] if others else [])
        else:
            self._gather = Gatherer([], None)
            self._units = [unit(names) for names in runs(module)]
        self._sum = ShardSum(self._units, self._gather.served)
        return module

    def _load(self, reader: CheckpointReader) -> None:
        for unit in self._units:
            unit.load(reader)
        flat.load_buffers(self._module, reader)
        self._step = reader.step

    def _all_peers(self) -> list[Peers]:
        return [*super()._all_peers(), self._gather_peers]

    def _add_up(self, group: Group, batch: Batch, shares: list[int]) -> float:
        """With zero=1 a worker adds up its microbatches, else it has not the room, and each is summed by itself."""
        # Peers wait for this worker in the midst of computing while they gather, normalise or look up rows.
        whole = self._context.plan.embeddings == "whole"
        self._sum.begin(group, waits=self._zero < 3 and not self._norm and whole)
        parts = self._parts(batch)
        rounds = (self._context.plan.microbatches or 1) if self._zero > 1 else 1
        total = 0.0
        if self._zero == 1:
            total = sum(self._backward(part) for part in parts[:-1])
            parts = parts[-1:]
        self._gather.open()
        for number in range(rounds):
            self._sum.last()
            total += self._round(parts[number] if number < len(parts) else None, first_of(shares))
            self._sum.flush()
        self._gather.close()
        return total

    def _round(self, part: Batch | None, lead: int) -> float:
        """Forward and backward of a microbatch, or of none while other workers have one."""
        if self._zero < 3:
            return self._backward(part) if part else 0.0
        total = None
        self._gather.begin("forward", lead)
        if part and part.samples:
            with torch.autograd.graph.saved_tensors_hooks(self._gather.pack, self._gather.unpack):
                # A share that does not count runs as well: it may be the lead's.
                total = (
                    loss_sum(self._job, forward(self._job, self._module, part), part)
                    if part.count
                    else nothing(self._job, self._module, part)
                )
        self._gather.end()
        self._gather.begin("backward", lead)
        if total is not None:
            torch.autograd.backward(total)
        self._gather.end()
        return total.item() if total is not None and part and part.count else 0.0

    def _waited(self) -> float:
        return super()._waited() + self._gather.waited + self._sum.waited

    def _finish_sum(self, status: Tensor) -> None:
        self._sum.finish(status)

    def _abandon(self) -> None:
        self._gather.close()
        self._sum.abandon()

    def _squared_norm(self, group: Group) -> float:
        square = torch.tensor([sum(squared_norm(unit.grad_s) for unit in self._units)], dtype=torch.float64)
        group.all_reduce_now(square)
        return square.item()

    def _update(self, factor: float, rate: float) -> None:
        for unit in self._units:
            self._job.optimizer.update(unit.own_s, unit.grad_s.mul_(factor), unit.slots, step=self._step + 1, lr=rate)
            unit.grad_s.zero_()
        self._step += 1

    def _publish(self, group: Group) -> None:
        """Gather the weights, where all are held by all."""
        handles = [group.all_gather(unit.whole_n, unit.bounds) for unit in self._units if unit.whole_n is not None]
        for handle in handles:
            handle.wait()
