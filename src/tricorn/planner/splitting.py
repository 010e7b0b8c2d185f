"""What splitting a job's layers among workers saves, and what it costs: found, and tried with two of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec
import torch

from tricorn.data.sources import arrays, as_source
from tricorn.errors import TricornError
from tricorn.plan import Plan
from tricorn.planner.computing import first_batch
from tricorn.planner.crew import Line
from tricorn.planner.figures import Curve, Figure, Point
from tricorn.planner.profile import Splitting
from tricorn.planner.rehearse import rehearse
from tricorn.state.flat import model_without_rows

if TYPE_CHECKING:
    from torch import nn

    from tricorn.job import Job

PAIR = Plan(strategy="mp", workers=2, tensor=2, microbatches=1)
SECONDS = 0.1  # that steps of one size should take together
FEWEST, MOST = 5, 16  # steps
MOST_TRIES = 2
UNSTEADY = 0.1  # scatter: workers wait for each other wherever somebody else takes a core now and then
LONGEST = 0.1  # seconds of forward and backward: of what takes longer, fewer samples are tried


def splitting(job: Job, stages: int, alone: Curve | None, line: Line) -> None:
    """Say what two shards would share, and exchange for it; None if nothing. A body for ``crew``.

    ``stages``: into how many the model was looked at to be cut, 0 if it cannot be. ``alone``: seconds of forward and
    backward by samples, by which steps of two workers are measured; None where there is no room for them.
    """
    from tricorn.mp.partition import blocks_of
    from tricorn.mp.tensor import find_for

    torch.set_num_threads(1)
    model = model_without_rows(job)
    samples, splits = min(2, len(as_source(job.train))), find_for(job, model, 2)
    if not splits.of:
        line.say(None)
        return
    blocks = [block.module for block in blocks_of(job, model, 2, stages)] if stages else [model]
    found = Splitting(
        shares=_shares(blocks, {id(parameter) for name, parameter in model.named_parameters() if name in splits.of}),
        sums=tuple(size / samples for size in splits.sums),
        gathers=tuple(size / samples for size in splits.gathers),
        steps=_tried(job, alone) if alone else None,
    )
    line.say(msgspec.to_builtins(found))


def _shares(blocks: Sequence[nn.Module], split: set[int]) -> tuple[float, ...]:
    """Of the elements of each block, those of the parameters (by id) that are split."""
    held = [list(block.parameters()) for block in blocks]
    shares = [sum(p.numel() for p in mine if id(p) in split) / max(1, sum(p.numel() for p in mine)) for mine in held]
    for index, mine in enumerate(held):  # what has no parameters and is between split layers works on their parts
        following = next((share for share, its in zip(shares[index:], held[index:], strict=True) if its), 0.0)
        if not mine and index:
            shares[index] = min(shares[index - 1], following)
    return tuple(shares)


def _tried(job: Job, alone: Curve) -> Curve | None:
    """Steps of two workers' own trainers on the first samples of the data; None if they fail."""
    most = int(alone.points[-1].x)
    while most > 1 and alone.at(most) > LONGEST:
        most //= 2
    batches = [first_batch(job, samples) for samples in sorted({max(1, most // 4), most})]
    resting = msgspec.structs.replace(job.optimizer, lr=0.0)  # or learning one batch again and again might diverge
    jobs = [replace(job, optimizer=resting, train=arrays(b.inputs, b.target), batch_size=b.samples) for b in batches]
    counts = [min(max(int(SECONDS / alone.at(b.samples)), FEWEST), MOST) for b in batches]
    tries: list[list[Figure]] = []
    with suppress(TricornError):
        while not tries or (len(tries) < MOST_TRIES and max(step.scatter for step in tries[-1]) > UNSTEADY):
            tries.append([found.step for found in rehearse(jobs, PAIR, counts)])
    if not tries:
        return None
    return Curve(tuple(Point(b.samples, *min(steps)) for b, *steps in zip(batches, *tries, strict=True)))
