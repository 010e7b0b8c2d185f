"""Where a model can be cut into stages, and the stages.

A model is listed as blocks that are applied one after another, each to what the one before it returned: by its own
``pipeline_blocks()`` if it has one, else by following its ``forward`` (trace.py), as an ``nn.Sequential`` always
can be.

Legend: p stages, b blocks; a cut c (1 <= c < b) lies before block c.
"""

from __future__ import annotations

import inspect
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tricorn.data.sources import as_source
from tricorn.errors import PlanError
from tricorn.mp.trace import Graphs, follow, hooked
from tricorn.mp.trace_cuts import spans
from tricorn.mp.trace_part import Part
from tricorn.state.flat import call_model
from tricorn.state.inspect import batch_statistics

if TYPE_CHECKING:
    from tricorn.job import Job

# With fewer blocks for each stage than this, more places to cut are looked for.
ENOUGH = 4


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


def blocks_of(job: Job, model: nn.Module, stages: int, fineness: int = 0) -> list[Block]:
    """``blocks`` of a job's model, called as with the first sample of the job's data."""
    inputs, _ = as_source(job.train).fetch(np.zeros(1, dtype=np.int64))
    return blocks(model, stages, inputs, fineness)


def blocks(model: nn.Module, stages: int, inputs: Any = None, fineness: int = 0) -> list[Block]:
    """The blocks of a model, in the order they are applied; fine enough for so many stages, or for ``fineness`` if that
    is more, where it can be.

    A model can list them itself: ``pipeline_blocks()`` returns modules and functions, the first of which takes the
    model's inputs and each other what the one before it returned; together they hold every parameter and buffer.
    ``inputs`` is an example of what the model is called with: what is not among it keeps its default.

    Raises PlanError with what would have to change in the model.
    """
    if hooked(model):
        raise PlanError(f"{_called(model)} has hooks, which no stage would run; register them on its submodules")
    listed = getattr(model, "pipeline_blocks", None)
    if listed is not None:
        return _listed(model, listed())
    given = None if inputs is None else _names(model, inputs)
    return _followed(model, stages, max(stages, fineness), given)


def _followed(model: nn.Module, stages: int, fineness: int, given: frozenset[str] | None) -> list[Block]:
    """As coarse as will do: submodules as they are, then looked into; cut at one value, then at several."""
    shallow = follow(model, deep=False, given=given)
    levels: list[Graphs] = [shallow]
    found: list[Block] = []
    for several in (False, True):
        for level in (0, 1):
            if level == len(levels):
                levels.append(follow(model, deep=True, given=given))
            finer = _cut_up(model, levels[level], several)
            found = max(found, finer, key=len)
            if len(found) >= ENOUGH * fineness:
                return found
    if len(found) < stages and (reasons := levels[-1].taken_whole):
        raise PlanError(reasons[0])
    return found


def _cut_up(model: nn.Module, graphs: Graphs, several: bool) -> list[Block]:
    pairs = zip(*(spans(model, graph, several=several) for graph in graphs[:2]), strict=True)
    return [Block(training.name, Part(model, training, evaluation)) for training, evaluation in pairs]


def _names(model: nn.Module, inputs: Any) -> frozenset[str]:
    """Which of the model's parameters the inputs are."""
    if isinstance(inputs, dict):
        return frozenset(inputs)
    count = len(inputs) if isinstance(inputs, tuple | list) else 1
    return frozenset(list(inspect.signature(model.forward).parameters)[:count])


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
    """The cuts that no statistics of batches lie across: two stages would each keep their own."""
    return [c for c in range(1, len(found)) if not any(low < c <= high for low, high in _keepers(found).values())]


def _keepers(found: Sequence[Block]) -> dict[nn.Module, tuple[int, int]]:
    """Layers that keep statistics of batches, with the first and the last block that use them."""
    reach: dict[nn.Module, tuple[int, int]] = {}
    for index, block in enumerate(found):
        modules = dict(block.module.named_modules())
        for name in batch_statistics(block.module):
            layer = modules.get(name, block.module)
            reach[layer] = (reach.get(layer, (index, index))[0], index)
    return reach


def tied(model: nn.Module, found: Sequence[Block], cuts: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The trained parameters that blocks of several stages use, by name, and these stages in ascending order.

    Each of the stages has a copy under that name; the gradient is the sum of theirs.
    """
    stages: dict[int, set[int]] = {}
    for index, block in enumerate(found):
        for parameter in block.module.parameters():
            stages.setdefault(id(parameter), set()).add(bisect_right(cuts, index))
    return {
        name: tuple(sorted(stages[id(parameter)]))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and len(stages.get(id(parameter), ())) > 1
    }


def refusal(model: nn.Module, found: Sequence[Block], stages: int) -> str | None:
    """Why these blocks cannot be cut into so many stages, and what would have to change; None if they can."""
    most = len(legal_cuts(found)) + 1
    if found and most >= stages:
        return None
    if len(found) < stages:
        return (
            f"{_called(model)} has {_counted(len(found), 'block')} for {stages} stages, where a block ends wherever "
            "tensors are all that is passed on; make it a longer chain (nn.Sequential), give it a method "
            f"pipeline_blocks() that lists its parts, or use at most {_counted(most, 'worker')}"
        )
    names = {module: name for name, module in model.named_modules()}
    shared = [names.get(layer, type(layer).__name__) for layer, (low, high) in _keepers(found).items() if low < high]
    return (
        f"{_called(model)} uses {', '.join(shared)}, which keeps statistics of the batch, in several blocks, so that "
        f"it can be cut into {_counted(most, 'stage')} at most, not {stages}; use GroupNorm or LayerNorm, or at most "
        f"{_counted(most, 'worker')}"
    )


def wrong_cuts(found: Sequence[Block], cuts: Sequence[int], stages: int) -> str | None:
    """Why the cuts do not make so many stages of these blocks, and which would; None if they do."""
    if len(cuts) != stages - 1:
        return f"cuts are {len(cuts)}, but {stages} stages have {stages - 1}; give that many"
    legal = legal_cuts(found)
    if illegal := [cut for cut in cuts if cut not in legal]:
        places = ", ".join(f"{cut} ({found[cut].name})" for cut in legal)
        return f"no stage can begin with block {illegal[0]}; cut before any of {places}"
    return None


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
