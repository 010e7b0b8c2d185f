"""What every worker of parameter server training has: the model, its tables, the servers, and how it takes a seat.

Legend: N elements of all dense parameters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tricorn.ps.declared import Declared, given_rows, new_feedback
from tricorn.ps.line import Line
from tricorn.ps.lookup import Ahead, Lookups
from tricorn.ps.rows import RowGradients, Wanted
from tricorn.state.flat import FlatParameters, device_of, model_without_rows
from tricorn.state.gradient import forward_backward, judge_share
from tricorn.state.rows import row_tables
from tricorn.state.shards import CheckpointReader
from tricorn.strategy import Batch, Context, Seat

if TYPE_CHECKING:
    from tricorn.ps.client import Client


class Worker:
    """What both kinds of trainer have in common. Tables are looked up and pushed, never held."""

    part: str | None = None

    def __init__(self, context: Context) -> None:
        self._context = context
        self._job = context.job
        model = model_without_rows(context.job)
        self._tables = row_tables(context.job, model)
        self._given = given_rows(model, self._tables)
        self._lookups = Lookups(model, self._tables, self._read)
        self._flat = FlatParameters(model, device_of(context.job))
        # The wire reads and writes CPU memory; on the CPU these are the flat tensors themselves.
        self._weights_N: Tensor = self._flat.weights_N.to("cpu")
        self._grads_N: Tensor = self._flat.grads_N.to("cpu")
        self._fresh = True  # the model still has its initial weights
        self._judging = False
        self._line = Line()
        self.computed = 0.0
        self._foreseen: dict[int, Ahead] = {}  # the step to come, and meanwhile this one
        self._feedback = new_feedback(context.plan.compress, self._grads_N)

    @property
    def bytes_sent(self) -> int:
        return self._line.bytes_sent

    @property
    def _client(self) -> Client:
        return self._line.client

    def held(self) -> int | None:
        """The weights are the servers' to hold."""
        return None

    def join(self, seat: Seat) -> None:
        self.close()
        if self._feedback and seat.source != "keep":
            self._feedback.forget()  # what it lost of steps that are undone
        if seat.source == "initial" and not self._fresh:
            self._begin_anew()
        elif seat.source == "checkpoint":
            assert seat.checkpoint is not None
            self._flat.load_buffers(CheckpointReader(seat.checkpoint, seat.step))
        compress = self._context.plan.compress
        declared = Declared(self._context, self._flat.entries, self._tables)
        client = self._line.take(declared.client(seat, compress=compress, feedback=self._feedback))
        declared.connect(client, len(seat.servers), initial=self._initial, given=self._given)
        self._given = []  # the servers have them now
        self._fresh = False

    def foresee(self, step: int, batch: Batch) -> None:
        self._foreseen[step] = self._lookups.ahead(batch.inputs)

    def evaluate(self, batch: Batch, samples: int, judge: Callable[[Any, Batch], None]) -> None:
        ahead = self._lookups.ahead(batch.inputs)
        self._judging = True
        try:
            self._read(ahead.wanted)
            self._lookups.begin(ahead, learning=False)
            judge_share(self._job, self._flat.module, batch, judge)
        finally:
            self._judging = False
            self._lookups.end()

    def interrupt(self) -> None:
        self._line.interrupt()

    def close(self) -> None:
        self._foreseen.clear()
        self._line.close()

    def _ahead(self, step: int, batch: Batch) -> Ahead:
        """What this step looks up, as far as it is known."""
        return self._foreseen.pop(step, None) or self._lookups.ahead(batch.inputs)

    def _read(self, wanted: Sequence[Wanted]) -> list[int]:
        """Rows that are needed now; returns the versions, by server."""
        return self._client.read_rows(wanted, peek=self._judging) if wanted else []

    def _gradient(self, batch: Batch, ahead: Ahead) -> tuple[float, list[RowGradients]]:
        """Fill ``_grads_N`` with the gradient sum of the batch; returns the loss sum and the gradient sums of rows."""
        began = time.perf_counter()
        self._flat.grads_N.zero_()
        self._lookups.begin(ahead)
        loss_sum = forward_backward(self._job, self._flat.module, batch)
        self.computed += time.perf_counter() - began
        self._grads_N.copy_(self._flat.grads_N)
        return loss_sum, self._lookups.end()

    @contextmanager
    def _pushing(self) -> Iterator[None]:
        """What an encoding lost is owed only if the push that it was for came to pass."""
        lost_N = self._feedback.lost_N.clone() if self._feedback else None
        try:
            yield
        except BaseException:
            if self._feedback and lost_N is not None:
                self._feedback.lost_N.copy_(lost_N)
            raise

    def _begin_anew(self) -> None:
        anew = model_without_rows(self._job)
        self._given = given_rows(anew, self._tables)
        tables = {table.parameter for table in self._tables}
        state = {name: value for name, value in anew.state_dict().items() if name not in tables}
        self._flat.module.load_state_dict(state)
        for buffer, initial in zip(self._flat.module.buffers(), anew.buffers(), strict=True):
            buffer.copy_(initial)  # a state dict need not have them all

    def _initial(self) -> Tensor:
        return self._weights_N.copy_(self._flat.weights_N)
