"""How many weights a step with zero=3 gathers, found by one forward of the model in one process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tricorn.dp.shard_gather import cast_of
from tricorn.dp.shard_units import blocks
from tricorn.state.flat import build_model
from tricorn.state.gradient import forward, loss_sum

if TYPE_CHECKING:
    from tricorn.job import Job
    from tricorn.strategy import Batch


def gathered(job: Job, batch: Batch) -> int:
    """Elements for forward and backward together: blocks that keep no weight for backward are gathered once.

    So are weights of no block. Raises what the user's code raises.
    """
    module = build_model(job)
    found, rest = blocks(module)
    named = dict(module.named_parameters())
    owners = {named[name]: number for number, (_, names) in enumerate(found) for name in names}
    places = {parameter.untyped_storage().data_ptr(): number for parameter, number in owners.items()}
    again: set[int] = set()

    def note(saved: Tensor) -> Tensor:
        number = places.get(saved.untyped_storage().data_ptr())
        if number is None and (parameter := cast_of(saved)) is not None:
            number = owners.get(parameter)
        if number is not None:
            again.add(number)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept):
        loss_sum(job, forward(job, module, batch), batch)
    sizes = [sum(named[name].numel() for name in names) for _, names in found]
    return sum(sizes) + sum(sizes[number] for number in again) + sum(named[name].numel() for name in rest)
