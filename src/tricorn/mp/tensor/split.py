"""A tensor of which each shard has a part. To the model's own code it looks whole.

It says the whole shape, and what is done with it is done with the parts where there is a rule for it (rules/), which
exchanges what must be exchanged. Whatever else is done with it, is done with the whole, gathered from all shards. So
no operation gives a wrong result, it only costs more. Autograd and the kernels see ordinary tensors: the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tricorn.errors import PlanError
from tricorn.mp.tensor.cut import Blocks, length_of
from tricorn.mp.tensor.team import Team

Call = Callable[..., Any]
Rule = Callable[[Call, tuple[Any, ...], dict[str, Any]], Any]

RULES: dict[Any, Rule] = {}


class Spread(NamedTuple):
    """How a tensor is split: along ``dim``, as ``blocks`` say. ``origins``: the parameters that it is so because of."""

    dim: int
    blocks: Blocks
    team: Team
    origins: frozenset[str] = frozenset()


class Split(Tensor):
    """See the module. ``spread`` says how; made by ``wrap``."""

    spread: Spread

    @classmethod
    def __torch_function__(
        cls, func: Call, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            rule = RULES.get(func)
            if rule is not None and (result := rule(func, args, given)) is not NotImplemented:
                return result
            name = getattr(func, "__name__", str(func))
            if _in_place(name) and args and isinstance(args[0], Split):
                raise PlanError(
                    f"{name} changes a tensor in place that tensor parallel workers hold a part of each; "
                    "write it without changing the tensor in place"
                )
            args, given = whole(args, name), whole(given, name)
            return func(*args, **given)


def rule(*functions: Any) -> Callable[[Rule], Rule]:
    """Register what to do when one of these functions is called with a split tensor among its arguments.

    The rule is called as ``rule(function, args, kwargs)``, with split tensors looking like their parts. It returns
    NotImplemented if it has to be done with the whole.
    """

    def register(written: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, written))
        return written

    return register


def wrap(part: Tensor, spread: Spread) -> Split:
    """The tensor, which nobody else has, as this shard's part of a split one."""
    part.__class__ = Split
    assert isinstance(part, Split)
    part.spread = spread
    return part


def shape_of(split: Split) -> list[int]:
    """The whole shape."""
    shape = list(Tensor.size(split))
    shape[split.spread.dim] = length_of(split.spread.blocks)
    return shape


def gather(split: Split, why: str = "") -> Tensor:
    """The whole tensor on all shards. Called under DisableTorchFunctionSubclass."""
    dim, blocks, team, origins = split.spread
    team.stopped(origins, why)
    return team.gather(split, dim, blocks)


def whole(value: Any, why: str = "") -> Any:
    """The value with every split tensor in it, in tuples, lists and dicts, made whole: on all shards alike."""
    if isinstance(value, Split):
        with torch._C.DisableTorchFunctionSubclass():
            return gather(value, why)
    if isinstance(value, dict):
        return {name: whole(item, why) for name, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(whole(item, why) for item in value))
    return type(value)(whole(item, why) for item in value) if type(value) in (tuple, list) else value


def _in_place(name: str) -> bool:
    if not name.endswith("__"):
        return name.endswith("_")
    return name == "__setitem__" or (name.startswith("__i") and name not in ("__index__", "__invert__", "__int__"))
