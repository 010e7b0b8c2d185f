"""What each block costs, timed on samples of the job's own data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tricorn.data.sources import as_source
from tricorn.mp import wire
from tricorn.mp.backward import backward
from tricorn.mp.deferred import Deferral
from tricorn.state.build import release
from tricorn.state.flat import WEIGHT_DTYPES, call_model
from tricorn.state.gradient import autocast, loss_sum, placed
from tricorn.strategy import Batch

if TYPE_CHECKING:
    from tricorn.job import Job
    from tricorn.mp.partition import Block

FEWEST_ROUNDS, MOST_ROUNDS = 3, 12
MOST_TOGETHER = 8  # microbatches in a round: a step seldom has many more for each stage
ENOUGH_SECONDS = 0.03  # for the rounds of one block
_UPDATED = 1 << 20  # elements


class Cost(NamedTuple):
    """Of one block and one microbatch, in the last block with the loss.

    Seconds of forward and of the two parts of backward; bytes that it hands on, and that it keeps from forward to
    backward, with those of them that it hands on; ``obstacle``: why no cut can come after, None if one can;
    ``together``: for how many microbatches at a time weight gradients are computed.
    """

    forward: float
    input_gradient: float
    weight_gradient: float
    handed_on: int
    kept: int
    kept_handed_on: int
    obstacle: str | None
    together: int = 1

    @property
    def seconds(self) -> float:
        return self.forward + self.input_gradient + self.weight_gradient


def example(job: Job, samples: int) -> Batch:
    """The first samples of the job's data, as one microbatch."""
    source = as_source(job.train)
    inputs, target = source.fetch(np.arange(min(samples, len(source)), dtype=np.int64))
    return Batch(inputs, target, len(target), max(1, int(job.count(inputs, target)) if job.count else len(target)))


def measure(job: Job, found: Sequence[Block], batch: Batch, device: torch.device) -> list[Cost]:
    """The median over a few rounds, after one to warm up. The blocks' layers and buffers change.

    One block at a time is on the device and has gradients, so that a model larger than the memory can be measured.
    """
    costs: list[Cost] = []
    value, saved_before = placed(job, batch.inputs, device), set[int]()
    for index, block in enumerate(found):
        block.module.to(device)
        parameters = [p for p in block.module.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        last = batch if index == len(found) - 1 else None
        run = _Run(job, block, device, first=index == 0, batch=last)
        made, saved = run.watched(value)
        if costs:
            both = _sizes(value, saved.given | saved_before)
            costs[-1] = costs[-1]._replace(kept=costs[-1].kept + both, kept_handed_on=both)
        times = list(run.rounds(value))
        for parameter in parameters:
            parameter.grad = None
        block.module.to("cpu")
        release()
        forward, backwards, weights = (median(column) for column in zip(*times, strict=True))
        size = sum(part.nbytes for part in _parts(made))
        costs.append(Cost(forward, backwards, weights, size, saved.inner, 0, wire.obstacle(made), run.together))
        value, saved_before = _fresh(made), saved.made
    return costs


def update_seconds(job: Job, device: torch.device) -> float:
    """What the optimizer takes, and what is done to gradients before and after, for each byte of trained weights."""
    flat = torch.zeros(_UPDATED, dtype=WEIGHT_DTYPES[job.precision], device=device)
    gradients, slots = torch.zeros_like(flat), {slot: torch.zeros_like(flat) for slot in job.optimizer.slots}
    times = []
    for step in range(FEWEST_ROUNDS + 1):
        began = time.perf_counter()
        gradients.mul_(0.5)
        job.optimizer.update(flat, gradients, slots, step=step + 1, lr=0.0)
        gradients.zero_()
        times.append(time.perf_counter() - began)
    return median(times[1:]) / flat.nbytes


class _Saved(NamedTuple):
    """What autograd keeps: bytes of what only the block knows, and which tensors of what it was given and has made."""

    inner: int
    given: set[int]
    made: set[int]


class _Run:
    """One block, run forward and backward as the pipeline does it."""

    def __init__(self, job: Job, block: Block, device: torch.device, *, first: bool, batch: Batch | None) -> None:
        self._job, self._module, self._device = job, block.module, device
        self._first, self._batch = first, batch
        self._deferral = Deferral()
        self._deferral.install(block.module)
        self.together = 1

    def watched(self, value: Any) -> tuple[Any, _Saved]:
        """What the block makes of the value, and what is kept until backward."""
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        given = _fresh(value)
        with torch.autograd.graph.saved_tensors_hooks(note, _as_it_is):
            made, end = self._forward(given)
        for tensor in (*self._module.parameters(), *self._module.buffers()):
            kept.pop(tensor.untyped_storage().data_ptr(), None)
        places = [[part.untyped_storage().data_ptr() for part in _parts(side)] for side in (given, made)]
        of_given, of_made = ({i for i, at in enumerate(side) if at in kept} for side in places)
        inner = sum(size for at, size in kept.items() if at not in places[0] and at not in places[1])
        waiting: list[Callable[[], None]] = []
        self._backward(end, waiting)
        for work in waiting:
            work()
        self.together = self._deferral.together
        self._deferral.finish()
        return made, _Saved(inner, of_given, of_made)

    def rounds(self, value: Any) -> Iterator[tuple[float, float, float]]:
        """Seconds of forward, and of the two parts of backward, of a microbatch in each of several rounds.

        A round has as many microbatches as are put together for the gradients of weights.
        """
        together, spent, count = min(MOST_TOGETHER, self.together), 0.0, 0
        while count < FEWEST_ROUNDS or (spent < ENOUGH_SECONDS and count < MOST_ROUNDS):
            waiting: list[Callable[[], None]] = []
            times = []
            for _ in range(together):
                given = _fresh(value)
                began = self._now()
                _, end = self._forward(given)
                between = self._now()
                self._backward(end, waiting)
                times.append((between - began, self._now() - between))
            began = self._now()
            self._finish(waiting)
            forward, backwards = (median(column) for column in zip(*times, strict=True))
            yield forward, backwards, (self._now() - began) / together
            spent, count = spent + (forward + backwards) * together + self._now() - began, count + 1

    def _forward(self, given: Any) -> tuple[Any, list[Tensor]]:
        """What is made, and where backward begins."""
        with autocast(self._job, self._device):
            made = call_model(self._module, given) if self._first else self._module(given)
        if self._batch is None:
            return made, [part for part in _parts(made) if part.requires_grad]
        loss = loss_sum(self._job, made, self._batch)
        return made, [loss] if loss.requires_grad else []

    def _backward(self, end: Sequence[Tensor], waiting: list[Callable[[], None]]) -> None:
        """But for the gradients of weights that can wait."""
        self._deferral.waiting = waiting
        try:
            backward(end, [torch.ones_like(part) for part in end])
        finally:
            self._deferral.waiting = None

    def _finish(self, waiting: list[Callable[[], None]]) -> None:
        while waiting:
            waiting.pop()()
        self._deferral.finish()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _sizes(value: Any, which: set[int]) -> int:
    """Bytes of these tensors of a value."""
    return sum(part.nbytes for index, part in enumerate(_parts(value)) if index in which)


def _fresh(value: Any) -> Any:
    """The value cut off from what made it, and copied, for the block may work in place."""
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(value.requires_grad).clone()
    if isinstance(value, dict):
        return {name: _fresh(item) for name, item in value.items()}
    return tuple(_fresh(item) for item in value) if isinstance(value, tuple | list) else value


def _parts(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [part for item in inner for part in _parts(item)]
