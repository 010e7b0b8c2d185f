"""Make a model's split parameters parts of what they were, and let its modules see them as split tensors."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tricorn.mp.tensor import rules
from tricorn.mp.tensor.cut import ranges_of
from tricorn.mp.tensor.split import Spread, whole, wrap
from tricorn.mp.tensor.splits import Splits
from tricorn.mp.tensor.team import Team
from tricorn.state.slabs import Slab, mark, slab_of

if TYPE_CHECKING:
    from tricorn.comm.group import Group

assert rules  # imported for what it registers

_SPREADS = "_tricorn_spreads"


def apply(module: nn.Module, splits: Splits, group: Group) -> Team:
    """Keep this shard's part of each parameter that is split. ``group`` are the shards, as many as ``splits`` is for.

    ``module`` is the model, or a part of it whose parameters have the names that the model gives them. They stay the
    same objects. In training its output may be a split tensor; otherwise it is made whole, and so it is where
    ``module.last`` is false, as of a pipeline's stage that another follows. Called again, with a group of the same
    size and rank, it only changes the group. Returns what its layers talk to the other shards by.
    """
    assert group.size == splits.shards
    team = Team(group)
    spreads: dict[int, Spread] = {}
    for name, parameter in module.named_parameters():
        if part := splits.of.get(name):
            blocks = part.among(group.size)
            if slab_of(parameter) is None:
                mark(parameter, Slab(tuple(parameter.shape), part.dim, ranges_of(blocks, group.rank)))
                own = team.narrow(parameter.detach(), part.dim, blocks)
                parameter.data = own.clone(memory_format=torch.contiguous_format)
            origins = frozenset({name}) if part.gathers else frozenset[str]()
            spreads[id(parameter)] = Spread(part.dim, blocks, team, origins)
            team.gathered_outputs |= origins
    for each in module.modules():
        if names := tuple(name for name, parameter in each._parameters.items() if id(parameter) in spreads):
            if _SPREADS not in vars(each):
                kind: Any = type(each)
                each.__class__ = _seeing(kind, names)
            vars(each)[_SPREADS] = {name: spreads[id(each._parameters[name])] for name in names}
    if spreads and _whole_output not in module._forward_hooks.values():
        module.register_forward_hook(_whole_output)
    return team


@cache
def _seeing(kind: Any, names: tuple[str, ...]) -> Any:
    """A module of that kind whose attributes of these names are split tensors, made of its parameters."""
    views = {name: property(_view(name)) for name in names}
    return type(kind.__name__, (kind,), {**views, "__module__": kind.__module__})


def _view(name: str) -> Any:
    def view(module: nn.Module) -> Tensor | None:
        parameter = module._parameters[name]
        return None if parameter is None else wrap(parameter.view_as(parameter), vars(module)[_SPREADS][name])

    return view


def _whole_output(module: nn.Module, given: Any, output: Any) -> Any:
    return output if module.training and getattr(module, "last", True) else whole(output)
