"""Where a model can be cut into stages, and where it is best cut.

A model is listed as blocks that are applied one after another, each to what the one before it returned: by its own
``pipeline_blocks()`` if it has one, else by following its ``forward`` (trace.py), as an ``nn.Sequential`` always
can be.

Legend: p stages, b blocks; a cut c (1 <= c < b) lies before block c.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tricorn.errors import PlanError
from tricorn.mp.trace import hooked, traced
from tricorn.state.flat import call_model

# With fewer blocks for each stage than this, a submodule that the user wrote is looked into for more.
ENOUGH = 2


class Block(NamedTuple):
    """A piece of a model that is never cut. ``name`` is the user's where there is one."""

    name: str
    module: nn.Module


class _Call(nn.Module):
    """A function of the user's as a block."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, value: Any) -> Any:
        return self.function(value)


def blocks(model: nn.Module, stages: int) -> list[Block]:
    """The blocks of a model, in the order they are applied; fine enough for so many stages where it can be.

    A model can list them itself: ``pipeline_blocks()`` returns modules and functions, the first of which takes the
    model's inputs and each other what the one before it returned; together they hold every parameter and buffer.

    Raises PlanError with what would have to change in the model.
    """
    if hooked(model):
        raise PlanError(f"{_called(model)} has hooks, which no stage would run; register them on its submodules")
    listed = getattr(model, "pipeline_blocks", None)
    if listed is not None:
        return _listed(model, listed())
    return [Block(name, module) for name, module in traced(model, ENOUGH * stages)]


def _listed(model: nn.Module, items: Sequence[Any]) -> list[Block]:
    names = {id(module): name for name, module in model.named_modules()}
    found = [
        Block(names.get(id(item), f"block {index}"), item)
        if isinstance(item, nn.Module)
        else Block(getattr(item, "__name__", f"block {index}"), _Call(item))
        for index, item in enumerate(items)
    ]
    held = {id(tensor) for block in found for tensor in _tensors(block.module)}
    named = [*model.named_parameters(), *model.named_buffers()]
    if missing := [name for name, tensor in named if id(tensor) not in held]:
        raise PlanError(
            f"no module of {_called(model)}.pipeline_blocks() holds {', '.join(missing)}; "
            "list the modules that do, not functions that use them"
        )
    return found


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def legal_cuts(found: Sequence[Block]) -> list[int]:
    """The cuts that no parameter or buffer is shared across, for a stage keeps its state to itself."""
    reach: dict[int, tuple[int, int]] = {}  # tensor -> first and last block that use it
    for index, block in enumerate(found):
        for tensor in _tensors(block.module):
            reach[id(tensor)] = (reach.get(id(tensor), (index, index))[0], index)
    return [c for c in range(1, len(found)) if not any(low < c <= high for low, high in reach.values())]


def refusal(model: nn.Module, found: Sequence[Block], stages: int) -> str | None:
    """Why these blocks cannot be cut into so many stages, and what would have to change; None if they can."""
    most = len(legal_cuts(found)) + 1
    if found and most >= stages:
        return None
    if len(found) < stages:
        return (
            f"{_called(model)} has {_counted(len(found), 'block')} for {stages} stages, where a block ends wherever a "
            "single value is passed on; make it a longer chain (nn.Sequential), give it a method pipeline_blocks() "
            f"that lists its parts, or use at most {_counted(most, 'worker')}"
        )
    return (
        f"{_called(model)} shares {', '.join(_shared(model, found))} between blocks, so that it can be cut into "
        f"{_counted(most, 'stage')} at most, not {stages}; untie them, or use at most {_counted(most, 'worker')}"
    )


def _shared(model: nn.Module, found: Sequence[Block]) -> list[str]:
    users: dict[int, int] = {}
    for block in found:
        for tensor in _tensors(block.module):
            users[id(tensor)] = users.get(id(tensor), 0) + 1
    named = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, tensor in named if users.get(id(tensor), 0) > 1]


def balance(costs: Sequence[float], stages: int, cuts: Sequence[int]) -> tuple[int, ...]:
    """The p - 1 of the legal ``cuts`` that make the slowest stage fastest; of equals, the earliest.

    Exact, by dynamic programming over stages and cuts. Raises PlanError if there are too few cuts.
    """
    if len(cuts) < stages - 1:
        raise PlanError(f"a model that can be cut into {_counted(len(cuts) + 1, 'stage')} cannot make {stages}")
    before = [0.0, *accumulate(costs)]
    edges = [*cuts, len(costs)]
    # rows[e]: the slowest stage, and the cuts, when the blocks before e make as many stages as there were rounds.
    rows: dict[int, tuple[float, tuple[int, ...]]] = {edge: (before[edge], ()) for edge in edges}
    for _ in range(stages - 1):
        rows = {
            edge: min(
                (max(slowest, before[edge] - before[last]), (*chosen, last))
                for last, (slowest, chosen) in rows.items()
                if last < edge
            )
            for edge in edges
            if min(rows) < edge
        }
    return rows[len(costs)][1]


class Stage(nn.Module):
    """Blocks [start, stop) of a model, whose parameters and buffers keep the names that the model gives them.

    Its tensors are moved to the device in place, so that a tensor that two modules hold stays one. The first stage
    looks after tensors that no block uses.
    """

    def __init__(self, model: nn.Module, found: Sequence[Block], start: int, stop: int, device: torch.device) -> None:
        super().__init__()
        self.first = start == 0
        self.last = stop == len(found)
        self.device = device
        self.blocks = nn.ModuleList(block.module for block in found[start:stop])
        others = {id(tensor) for block in found[stop if self.first else 0 :] for tensor in _tensors(block.module)}
        own = {id(tensor) for tensor in _tensors(self.blocks)}
        mine = [tensor for tensor in _tensors(model) if id(tensor) in own or (self.first and id(tensor) not in others)]
        for tensor in mine:
            tensor.data = tensor.data.to(device)
        kept = {id(tensor) for tensor in mine}
        self._names = (
            [(name, tensor) for name, tensor in model.named_parameters() if id(tensor) in kept],
            [(name, tensor) for name, tensor in model.named_buffers() if id(tensor) in kept],
        )

    def forward(self, value: Any) -> Any:
        """Run the blocks: on the model's inputs if this is the first stage, else on what the stage before gave."""
        first, *rest = self.blocks
        value = call_model(first, value) if self.first else first(value)
        for block in rest:
            value = block(value)
        return value

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._names[0]

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        yield from self._names[1]


def _called(model: nn.Module) -> str:
    return type(model).__name__


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
