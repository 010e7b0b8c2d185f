"""Operations on each element by itself, with broadcasting, and random numbers for each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tricorn.mp.tensor.rules.operand import beside, bound, from_end, made_of, splits_in
from tricorn.mp.tensor.split import Call, Split, rule
from tricorn.mp.tensor.team import Team

_FUNCTIONS = (
    "relu sigmoid tanh exp log sqrt rsqrt square abs neg sin cos tan erf reciprocal floor ceil round sign clamp "
    "clamp_min clamp_max log1p expm1 log2 log10 exp2 logit isnan isinf isfinite logical_not nan_to_num atan sinh cosh "
    "add sub mul div true_divide floor_divide remainder fmod pow maximum minimum eq ne lt le gt ge logical_and "
    "logical_or logical_xor where masked_fill lerp addcmul addcdiv atan2 hypot fmin fmax subtract multiply divide rsub"
)
_METHODS = (
    "to float double half bfloat16 int long bool type type_as detach clone contiguous requires_grad_ __rsub__ __rdiv__ "
    "__rtruediv__ __pow__ __rpow__ __rfloordiv__ __floordiv__ __and__ __or__ __xor__"
)
_LIKE = (torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like)
_ACTIVATIONS = (
    "relu relu6 gelu silu mish elu selu celu leaky_relu hardtanh hardswish hardsigmoid hardshrink softplus softshrink "
    "softsign tanhshrink logsigmoid sigmoid tanh threshold"
)


def _functions() -> Iterator[Any]:
    both = [(place, name) for name in _FUNCTIONS.split() for place in (torch, Tensor)]
    for place, name in [*both, *((F, name) for name in _ACTIVATIONS.split())]:
        for variant in (name, f"{name}_"):
            if (function := getattr(place, variant, None)) is not None:
                yield function
    for name in _METHODS.split():
        yield getattr(Tensor, name)
    yield from _LIKE
    yield vars(torch._C.TensorBase)["data"].__get__


@rule(*_functions())
def elementwise(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    first = args[0]
    if len(args) == 1 and isinstance(first, Split) and not splits_in(kwargs.values()):
        return made_of(function(first, **kwargs), first.spread.dim, first.spread.blocks, first)
    if function.__name__.endswith("_") and not function.__name__.startswith("__") and not isinstance(first, Split):
        return NotImplemented  # a whole tensor that is changed in place stays whole
    found = splits_in((*args, *kwargs.values()))
    split = found[0]
    place = from_end(split)
    given = [beside(value, split, place) for value in (*args, *kwargs.values())]
    if any(new is None and old is not None for new, old in zip(given, (*args, *kwargs.values()), strict=True)):
        return NotImplemented
    result = function(*given[: len(args)], **dict(zip(kwargs, given[len(args) :], strict=True)))
    return made_of(result, result.ndim + place, split.spread.blocks, *found)


@rule(F.dropout, F.alpha_dropout, F.feature_alpha_dropout, F.dropout1d, F.dropout2d, F.dropout3d)
def dropout(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    split, p, training = bound(args, kwargs, p=0.5, training=True)
    if not isinstance(split, Split):
        return NotImplemented
    with draws(split.spread.team, split.device, active=training and p > 0):
        result = function(*args, **kwargs)
    return made_of(result, split.spread.dim, split.spread.blocks, split)


@contextlib.contextmanager
def draws(team: Team, device: torch.device, *, active: bool) -> Iterator[None]:
    """Random numbers that differ from shard to shard, and leave what all shards draw after them alike.

    They follow from the state of the default generator, so a forward that is repeated from that state draws the same.
    """
    if not active or team.shard is None:
        yield
        return
    generator = torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    state = generator.get_state()
    generator.manual_seed(seed + team.shard)
    try:
        yield
    finally:
        generator.set_state(state)
