"""What each block costs, timed on samples of the job's own data."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tricorn.data.sources import as_source
from tricorn.errors import PlanError
from tricorn.mp import wire
from tricorn.mp.backward import backward
from tricorn.mp.partition import Block, balance, blocks, legal_cuts
from tricorn.state.flat import build_model, call_model
from tricorn.state.gradient import autocast, placed

if TYPE_CHECKING:
    from tricorn.job import Job

ROUNDS = 3


class Cost(NamedTuple):
    """``seconds``: forward and backward of one microbatch; ``obstacle``: why no cut can come after, None if one can."""

    seconds: float
    obstacle: str | None


def choose_cuts(job: Job, stages: int, samples: int, device: torch.device) -> tuple[int, ...]:
    """The cuts that make the slowest stage fastest, measured with microbatches of that many samples.

    Raises PlanError if the model cannot be cut so often, and whatever the user's code raises.
    """
    if stages == 1:
        return ()
    found = blocks(build_model(job), stages)
    cuts = legal_cuts(found)
    source = as_source(job.train)
    inputs, _ = source.fetch(np.arange(min(samples, len(source)), dtype=np.int64))
    costs = measure(job, found, inputs, device)
    if hindered := [(found[c - 1].name, why) for c in cuts if (why := costs[c - 1].obstacle)]:
        cuts = [c for c in cuts if costs[c - 1].obstacle is None]
        if len(cuts) < stages - 1:
            name, why = hindered[0]
            raise PlanError(
                f"{name} hands on {why}, which cannot travel from stage to stage; let it return a tensor or a tuple of "
                f"tensors, or use at most {len(cuts) + 1} workers"
            )
    return balance([cost.seconds for cost in costs], stages, cuts)


def measure(job: Job, found: Sequence[Block], inputs: Any, device: torch.device) -> list[Cost]:
    """The median over a few rounds, after one to warm up. The blocks' gradients and buffers change.

    One block at a time is on the device, so that a model larger than the device can be measured.
    """
    costs: list[Cost] = []
    value = placed(job, inputs, device)
    for index, block in enumerate(found):
        block.module.to(device)
        taken = []
        for _ in range(1 + ROUNDS):
            seconds, made = _once(job, block, value, device, first=index == 0)
            taken.append(seconds)
        block.module.to("cpu")
        costs.append(Cost(median(taken[1:]), wire.obstacle(made)))
        value = made
    return costs


def _once(job: Job, block: Block, value: Any, device: torch.device, *, first: bool) -> tuple[float, Any]:
    given = _fresh(value)
    started = _now(device)
    with autocast(job, device):
        made = call_model(block.module, given) if first else block.module(given)
    wanted = [part for part in _parts(made) if part.requires_grad]
    backward(wanted, [torch.ones_like(part) for part in wanted])
    return _now(device) - started, made


def _fresh(value: Any) -> Any:
    """The value cut off from what made it, and copied, for the block may work in place."""
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(value.requires_grad).clone()
    if isinstance(value, dict):
        return {name: _fresh(item) for name, item in value.items()}
    return tuple(_fresh(item) for item in value) if isinstance(value, tuple | list) else value


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _parts(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [part for item in inner for part in _parts(item)]
