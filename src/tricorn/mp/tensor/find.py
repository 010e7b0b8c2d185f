"""Find what of a model can be split, by running it as if it were.

Runs on a few samples in which every tensor is whole, but some say that they are split (follow.py): the rules then tell
what of the model's own code can be done with parts. Where a value had to be made whole again, the layer that it came
of stays whole in the next run, or what it makes is gathered if it is large. Runs are repeated until nothing has to
change: each settles at least one layer.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from tricorn.mp.tensor.follow import Follow
from tricorn.mp.tensor.rehearsal import Rehearsal
from tricorn.mp.tensor.splits import Part, Splits
from tricorn.state.flat import call_model

LARGE = 2**18  # elements of a weight that is worth splitting even if what it makes has to be gathered


def find(model: nn.Module, inputs: Any, shards: int, *, large: int = LARGE) -> Splits:
    """How to split the model's parameters. ``inputs`` are two samples or more, as the model takes them.

    The model stays as it is, and so do random numbers. Raises what the model raises.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    stopped: dict[str, str] = {}
    gathered: set[str] = set()
    arranged: dict[str, tuple[int, ...]] = {}
    while True:
        rehearsal = Rehearsal(shards, large=large, sizes=sizes, gathered=gathered)
        follow = Follow(rehearsal, names, stopped, arranged)
        _run(model, inputs, follow)
        if asked := {name: lengths for name, lengths in rehearsal.arranged.items() if name not in arranged}:
            arranged |= asked  # what else was noted may have come of that
            continue
        if not rehearsal.stops:
            break
        for name, why in rehearsal.stops.items():
            if sizes[name] >= large and name not in gathered:
                gathered.add(name)
            else:
                stopped[name] = why
    parts = {
        name: Part(dim, tuple((block.length, block.cut.units) for block in blocks), name in gathered)
        for name, (dim, blocks) in follow.roles.items()
    }
    reasons = {name: reason for name, reason in {**follow.refused, **stopped}.items() if name not in parts}
    return Splits(
        model=type(model).__name__, shards=shards, of=parts, whole=reasons, sums=tuple(rehearsal.to_sum),
        gathers=tuple(rehearsal.to_gather),
    )  # fmt: skip


def _run(model: nn.Module, inputs: Any, follow: Follow) -> None:
    held = {id(parameter): parameter for parameter in model.parameters()}
    rehearsed = copy.deepcopy(model, {**held, **{id(buffer): buffer.clone() for buffer in model.buffers()}}).train()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        with follow:
            output = call_model(rehearsed, inputs)
        follow.finish(output)
