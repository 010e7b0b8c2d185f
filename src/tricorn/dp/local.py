"""Local updates under data parallel: at the end of a round the workers add up how far each went (worker/rounds.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tricorn.comm.group import Group
from tricorn.dp.compress import gradient_sum
from tricorn.state.flat import OUTER_PREFIX, FlatState, build_model, device_of, flat_pieces
from tricorn.state.gradient import check_finite
from tricorn.state.shards import CheckpointReader, Piece
from tricorn.strategy import Context, Outcome
from tricorn.worker.rounds import OUTER, RoundTrainer


class LocalTrainer(RoundTrainer):
    """Fulfils ``tricorn.strategy.Trainer``. The outer optimizer has the same state on all."""

    def __init__(self, context: Context) -> None:
        self._outer = OUTER[context.plan.outer]
        super().__init__(context, "dp")

    def pieces(self) -> Sequence[Piece]:
        if self._context.rank:
            return []
        return self._state.pieces() + flat_pieces(self._outer_tensors(), self._state.entries)

    def _build_state(self) -> FlatState:
        state = FlatState(build_model(self._job), self._job.optimizer, device_of(self._job))
        self._sum = gradient_sum(state, self._context.plan.compress)
        self._outer_slots = {slot: torch.zeros_like(state.weights_N) for slot in self._outer.slots}
        return state

    def _outer_tensors(self) -> dict[str, Tensor]:
        return {f"{OUTER_PREFIX}/{slot}": flat_N for slot, flat_N in self._outer_slots.items()}

    def _meet(self, group: Group, step: int, count: int) -> Outcome:
        state, start_N = self._state, self._kept[0]
        status = torch.tensor(self._round, dtype=torch.float64)
        self._sum.begin(group, int(self._round[1]))
        self._sum.finish(status)
        outcome = Outcome.of(status.tolist())
        check_finite(step, outcome)
        state.weights_N.copy_(start_N)
        state.grads_N.div_(max(outcome.count, 1))
        self._outer.update(state.weights_N, state.grads_N, self._outer_slots, step=1, lr=self._outer.lr)
        return outcome

    def _between(self, step: int, count: int) -> None:
        """Nobody hears of it."""

    def _abandon(self) -> None:
        self._sum.abandon()

    def _load(self, reader: CheckpointReader) -> None:
        self._state.load(reader)
        for prefix, flat_N in self._outer_tensors().items():
            for entry in self._state.entries:
                stored = f"{prefix}/{entry.name}"  # not there if the run had no local steps until now
                if stored in reader:
                    flat_N[entry.start : entry.stop] = reader.read_whole(stored, entry.shape)
                else:
                    flat_N[entry.start : entry.stop] = 0

    def _replicated(self) -> list[Tensor]:
        return [*self._changing(), *self._outer_slots.values()]
