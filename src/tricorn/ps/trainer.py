"""A worker of parameter server training: gradients go to the servers, weights come back.

Legend: N elements of all trainable parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tricorn.ps.client import Ack, Client
from tricorn.ps.placement import place
from tricorn.ps.table import Description
from tricorn.state.flat import FlatParameters, build_model, device_of
from tricorn.state.gradient import (
    check_finite,
    clip_factor,
    forward_backward,
    judge_share,
    learning_rate,
    squared_norm,
)
from tricorn.state.shards import CheckpointReader, Piece
from tricorn.strategy import Batch, Context, Outcome, Seat, Wishes, even_share


class _Worker:
    """What both kinds have in common: the model, the servers, and taking a seat."""

    part: str | None = None

    def __init__(self, context: Context) -> None:
        self._context = context
        self._job = context.job
        self._flat = FlatParameters(build_model(context.job), device_of(context.job))
        # The wire reads and writes CPU memory; on the CPU these are the flat tensors themselves.
        self._weights_N: Tensor = self._flat.weights_N.to("cpu")
        self._grads_N: Tensor = self._flat.grads_N.to("cpu")
        self._fresh = True  # the model still has its initial weights
        self._connected: Client | None = None
        self._sent_before = 0  # by the clients of earlier epochs

    @property
    def bytes_sent(self) -> int:
        client = self._connected  # read once: another thread may ask while this one closes
        return self._sent_before + (client.bytes_sent if client else 0)

    @property
    def _client(self) -> Client:
        assert self._connected is not None, "join before anything else"
        return self._connected

    def held(self) -> int | None:
        """The weights are the servers' to hold."""
        return None

    def join(self, seat: Seat) -> None:
        self.close()
        context, plan = self._context, self._context.plan
        if seat.source == "initial" and not self._fresh:
            anew = build_model(self._job)
            self._flat.module.load_state_dict(anew.state_dict())
            for buffer, initial in zip(self._flat.module.buffers(), anew.buffers(), strict=True):
                buffer.copy_(initial)  # a state dict need not have them all
        elif seat.source == "checkpoint":
            assert seat.checkpoint is not None
            self._flat.load_buffers(CheckpointReader(seat.checkpoint, seat.step))
        slices = place(self._flat.entries, len(seat.servers))
        self._connected = client = Client(
            seat.servers, slices, context.secret, rank=context.rank, incarnation=context.incarnation, epoch=seat.epoch
        )
        client.connect()
        if context.rank == 0:
            tables = tuple((entry.name, entry.shape) for entry in self._flat.entries)
            descriptions = [
                Description(
                    tables=tables,
                    dtype="float64" if self._weights_N.dtype == torch.float64 else "float32",
                    start=start,
                    stop=stop,
                    optimizer=self._job.optimizer,
                    consistency=plan.consistency,
                    staleness=plan.staleness,
                )
                for start, stop in slices
            ]
            client.create(descriptions, lambda: self._weights_N.copy_(self._flat.weights_N))
        self._fresh = False

    def evaluate(self, batch: Batch, samples: int, judge: Callable[[Any, Batch], None]) -> None:
        judge_share(self._job, self._flat.module, batch, judge)

    def interrupt(self) -> None:
        if client := self._connected:
            client.interrupt()

    def close(self) -> None:
        if client := self._connected:
            self._sent_before += client.bytes_sent
            self._connected = None
            client.close()

    def _gradient(self, batch: Batch) -> float:
        """Fill ``_grads_N`` with the gradient sum of the batch; returns the loss sum."""
        self._flat.grads_N.zero_()
        loss_sum = forward_backward(self._job, self._flat.module, batch)
        self._grads_N.copy_(self._flat.grads_N)
        return loss_sum


class BspTrainer(_Worker):
    """Fulfils ``tricorn.strategy.Trainer``: all workers contribute to each step, and it is applied once decided."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        # Buffers that a forward changes are here only; the servers have the weights. Rank 0 saves its own for all.
        self.part = "buffers" if context.rank == 0 and next(self._flat.module.buffers(), None) is not None else None
        self._step: int | None = None  # the step that the buffers belong to: all before it are decided
        self._buffers_before: tuple[int, list[Tensor]] = (-1, [])  # a step, and the buffers it began with

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
        ack = self._client.status(seat.step - 1)
        self._pull(seat.step, ack)

    def share(self, samples: int) -> tuple[int, int]:
        return even_share(samples, self._context.rank, self._context.plan.workers)

    def step(self, step: int, batch: Batch, samples: int, wishes: Wishes) -> Outcome:
        self._buffers_before = (step, [buffer.clone() for buffer in self._flat.module.buffers()])
        loss_sum = self._gradient(batch)
        ack = self._client.push_sum(step, (loss_sum, batch.count, batch.samples, *wishes), self._grads_N)
        self._pull(step + 1, ack)
        return Outcome.of(ack.status)

    def pieces(self) -> Sequence[Piece]:
        """Rank 0 has the servers save the weights of this step, and adds the buffers, which they do not have."""
        if self._context.rank != 0:
            return []
        assert self._step is not None
        self._client.snapshot(self._step)
        return self._flat.buffer_pieces()

    def _pull(self, version: int, ack: Ack | None) -> None:
        """Take the weights of that version; ``ack`` is what the step before it came to, if that is known."""
        scale, lr = 1.0, 0.0
        if ack:
            check_finite(version - 1, Outcome.of(ack.status))
            scale, lr = clip_factor(self._job, ack.squared_norm), learning_rate(self._job, version - 1)
        self._step = version
        self._client.pull_version(version, self._weights_N, scale=scale, lr=lr)
        self._flat.weights_N.copy_(self._weights_N)


class AsyncTrainer(_Worker):
    """Fulfils ``tricorn.strategy.LeasedTrainer``: each worker turns whole batches into updates by itself."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._versions: list[int] = []  # by server, of the weights this worker has

    def join(self, seat: Seat) -> None:
        super().join(seat)
        self.refresh()

    def share(self, samples: int) -> tuple[int, int]:
        return 0, samples

    def step(self, step: int, batch: Batch, samples: int, wishes: Wishes) -> Outcome:
        self._pull()
        loss_sum = self._gradient(batch)
        outcome = Outcome(loss_sum, batch.count, batch.samples, wishes)
        check_finite(step, outcome)
        self._grads_N.div_(max(batch.count, 1))
        if self._job.clip_norm is not None:
            self._grads_N.mul_(clip_factor(self._job, squared_norm(self._grads_N)))
        self._client.push(step, self._versions, self._grads_N, lr=learning_rate(self._job, step))
        return outcome

    def refresh(self) -> None:
        self._pull(peek=True)

    def idle(self) -> None:
        self._client.idle()

    def pieces(self) -> Sequence[Piece]:
        """Nothing: the servers save the state, when the coordinator has let all work come to rest."""
        return []

    def _pull(self, *, peek: bool = False) -> None:
        self._versions = self._client.pull(self._weights_N, peek=peek)
        self._flat.weights_N.copy_(self._weights_N)
