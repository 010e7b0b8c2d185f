"""Forward, backward and update of a job, timed by some processes at the same moments."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from tricorn.data.sources import as_source
from tricorn.dp.in_place import InPlace
from tricorn.planner.crew import Line, crew, gather, tell
from tricorn.planner.figures import Curve, Figure, Point
from tricorn.state.flat import FlatParameters, build_model, device_of, model_without_rows
from tricorn.state.gradient import forward_backward
from tricorn.state.rows import row_tables
from tricorn.strategy import Batch

if TYPE_CHECKING:
    from tricorn.job import Job

POINT_SECONDS = 0.15  # for each size: as many rounds as fit
FEWEST_ROUNDS, MOST_ROUNDS = 3, 40
AWAKE, AVERAGED = 0.2, 1.0  # seconds
FEWEST = 1 << 14  # elements whose update is measured


def side_by_side(bodies: Sequence[Callable[[Line], None]], sizes: Sequence[int]) -> dict[str, Curve]:
    """Curves of the slowest of some forks, for which all others wait; each size is begun by all at the same moment."""
    found = _together(bodies, sizes)
    return {
        name: Curve(tuple(max(points, key=lambda point: point.seconds)
                          for points in zip(*(each[name] for each in found), strict=True)))
        for name in found[0]
    }  # fmt: skip


def _together(bodies: Sequence[Callable[[Line], None]], sizes: Sequence[int]) -> list[dict[str, list[Point]]]:
    with crew(bodies) as lines:
        for _ in range(len(sizes) + 1):
            gather(lines)
            tell(lines, "go")
        return [
            {name: [Point(*point) for point in points] for name, points in found.items()} for found in gather(lines)
        ]


def compute(job: Job, threads: int, sizes: Sequence[int], how: str, line: Line) -> None:
    """``how``: "whole", "direct" (gradients of linear layers go to their places) or "served" (rows are elsewhere)."""
    torch.set_num_threads(threads)
    run, flat = {"whole": whole, "direct": _direct, "served": rows_served}[how](job)
    points, kept = [], 0.0
    for samples in sizes:
        batch = first_batch(job, samples)
        kept = max(kept, _kept(partial(run, batch), flat.weights_N) / batch.samples)
        line.say("ready")
        line.hear()
        points.append(Point(batch.samples, *rounds(partial(run, batch))))
    line.say("ready")
    line.hear()
    line.say({"compute": points, "update": list(_updates(job, flat.weights_N)), "kept": [Point(1, kept, 0.0)]})


def on_average(job: Job, samples: int, line: Line) -> None:
    """Seconds of forward and backward with one thread, by the clock: a host that may not run all the time stands still
    in some rounds, and a median would not see it.
    """
    torch.set_num_threads(1)
    run, batch = whole(job)[0], first_batch(job, samples)

    def mean(seconds: float) -> float:
        began, count = time.perf_counter(), 0
        while (spent := time.perf_counter() - began) < seconds:
            run(batch)
            count += 1
        return spent / count

    mean(AWAKE)
    line.say(mean(AVERAGED))


def _kept(work: Callable[[], object], weights_N: Tensor) -> int:
    """Bytes that autograd keeps from forward to backward, but for the weights."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, _as_it_is):
        work()
    sizes.pop(weights_N.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _updates(job: Job, weights_N: Tensor) -> Iterator[Point]:
    """The optimizer's update of as many elements as the model has, and of fewer."""
    size = len(weights_N)
    for elements in sorted({FEWEST, max(FEWEST, size // 8), max(FEWEST, size)}):
        weights, grads = (torch.zeros(elements, dtype=weights_N.dtype, device=weights_N.device) for _ in range(2))
        slots = {slot: torch.zeros_like(weights) for slot in job.optimizer.slots}
        work = partial(job.optimizer.update, weights, grads, slots, step=1, lr=0.0)
        yield Point(weights.nbytes, *rounds(work))


def whole(job: Job) -> tuple[Callable[[Batch], object], FlatParameters]:
    """Forward and backward where every parameter is here, and so is its gradient."""
    flat = FlatParameters(build_model(job), device_of(job))
    return partial(forward_backward, job, flat.module), flat


def _direct(job: Job) -> tuple[Callable[[Batch], object], FlatParameters]:
    """The same as data parallel runs it on one host."""
    run, flat = whole(job)
    InPlace(flat.module, _Places(flat.module))
    return run, flat


class _Places:
    """Each gradient takes the place of the one before."""

    def __init__(self, module: nn.Module) -> None:
        self._grads: dict[Tensor, Tensor | None] = {parameter: parameter.grad for parameter in module.parameters()}

    def claim(self, parameter: Tensor) -> tuple[Tensor, bool] | None:
        place = self._grads[parameter]
        return None if place is None else (place, False)


def rows_served(job: Job) -> tuple[Callable[[Batch], object], FlatParameters]:
    """The same where rows of tables come from servers, at once and all zero."""
    from tricorn.ps.lookup import Lookups

    model = model_without_rows(job)
    lookups = Lookups(model, row_tables(job, model), lambda wanted: [each.out_UD.zero_() for each in wanted])
    flat = FlatParameters(model, device_of(job))

    def run(batch: Batch) -> None:
        ahead = lookups.ahead(batch.inputs)
        for each in ahead.wanted:
            each.out_UD.zero_()
        lookups.begin(ahead)
        forward_backward(job, flat.module, batch)
        lookups.end()

    return run, flat


def rounds(work: Callable[[], object], before: Callable[[], object] = int) -> Figure:
    """Rounds for ``POINT_SECONDS``, but three at least, after one that does not count; ``before`` each is not timed."""
    taken: list[float] = []
    until = time.perf_counter() + POINT_SECONDS
    while len(taken) <= FEWEST_ROUNDS or (time.perf_counter() < until and len(taken) < MOST_ROUNDS):
        before()
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return Figure.of(taken[1:])


def first_batch(job: Job, samples: int) -> Batch:
    """The first samples of the data."""
    source = as_source(job.train)
    ids = np.arange(min(samples, len(source)), dtype=np.int64)
    inputs, target = source.fetch(ids)
    count = len(ids) if job.count is None else int(job.count(inputs, target))
    return Batch(inputs, target, len(ids), count)
