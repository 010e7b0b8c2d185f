"""Operations along dimensions: sums, norms, softmax, pooling; and the loss over a divided vocabulary."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tricorn.mp.tensor.cut import Block
from tricorn.mp.tensor.rules.operand import from_end, made_of, part_of
from tricorn.mp.tensor.rules.vocabulary import log_sum_exp
from tricorn.mp.tensor.split import Call, Split, rule, shape_of

_POOLS = (
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool1d lp_pool2d interpolate"
)


@rule(*(getattr(F, name) for name in _POOLS.split()), torch.max_pool1d, torch.max_pool2d, torch.adaptive_avg_pool1d)
def pool(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    split = args[0]
    if split.spread.dim != 1 or split.ndim < 3:
        return NotImplemented
    return made_of(function(*args, **kwargs), 1, split.spread.blocks, split)


@rule(F.pad)
def pad(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    split, widths = args[0], args[1] if len(args) > 1 else kwargs["pad"]
    if split.spread.dim >= split.ndim - len(widths) // 2:
        return NotImplemented
    return made_of(function(*args, **kwargs), split.spread.dim, split.spread.blocks, split)


@rule(torch.sum, Tensor.sum, torch.mean, Tensor.mean)
def total(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    split, *given = args
    dims = given[0] if given else kwargs.get("dim")
    if len(given) > 2 or isinstance(dims, bool) or "dtype" in kwargs:
        return NotImplemented
    keep = given[1] if len(given) > 1 else kwargs.get("keepdim", False)
    wanted = range(split.ndim) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = sorted({dim % split.ndim for dim in wanted})
    dim, blocks, team, _ = split.spread
    if dim not in gone:
        moved = dim if keep else dim - sum(other < dim for other in gone)
        return made_of(getattr(split, function.__name__)(gone, keep), moved, blocks, split)
    made = team.sum(split.sum(gone, keep))
    if function.__name__ == "mean":
        made = made / prod(shape_of(split)[each] for each in gone)
    return made


@rule(
    torch.amax, Tensor.amax, torch.amin, Tensor.amin, torch.var, Tensor.var, torch.std, Tensor.std, torch.prod,
    Tensor.prod, torch.logsumexp, Tensor.logsumexp, torch.norm, Tensor.norm, torch.cumsum, Tensor.cumsum, F.normalize,
    torch.argmax, Tensor.argmax, torch.max, Tensor.max, torch.linalg.vector_norm,
)  # fmt: skip
def within_parts(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Along one dimension, by name, which is not the divided one."""
    split, dim = args[0], kwargs.get("dim")
    if not isinstance(split, Split) or type(dim) is not int or dim % split.ndim == split.spread.dim:
        return NotImplemented
    result = function(*args, **kwargs)
    shape = (result[0] if isinstance(result, tuple) else result).ndim
    removed = shape < split.ndim and dim % split.ndim < split.spread.dim
    return made_of(result, split.spread.dim - removed, split.spread.blocks, split)


@rule(torch.softmax, Tensor.softmax, F.softmax, torch.log_softmax, Tensor.log_softmax, F.log_softmax)
def softmax(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    split, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim")
    if not isinstance(dim, int):
        return NotImplemented
    if dim % split.ndim != split.spread.dim:
        return made_of(function(*args, **kwargs), split.spread.dim, split.spread.blocks, split)
    if len(args) > 2 or kwargs.get("dtype") is not None:
        return NotImplemented
    team = split.spread.team
    logits = split.float() if split.dtype in (torch.bfloat16, torch.float16) else split
    total_ = team.shared(log_sum_exp(logits.movedim(dim, -1), team)).unsqueeze(-1).movedim(-1, dim)
    logs = logits - total_
    return made_of(logs if "log" in function.__name__ else logs.exp(), split.spread.dim, split.spread.blocks, split)


@rule(F.layer_norm, F.rms_norm)
def layer_norm(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = ("input", "normalized_shape", "weight", "bias", "eps") if function is F.layer_norm else (
        "input", "normalized_shape", "weight", "eps")  # fmt: skip
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    split = given["input"]
    if not isinstance(split, Split) or from_end(split) >= -len(given["normalized_shape"]):
        return NotImplemented
    for name in ("weight", "bias"):
        if isinstance(given.get(name), Tensor):
            given[name] = split.spread.team.shared(given[name])
    return made_of(function(**given), split.spread.dim, split.spread.blocks, split)


@rule(F.batch_norm)
def batch_norm(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Of divided channels. The running statistics stay whole on every shard."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    split = given["input"]
    if not isinstance(split, Split) or split.spread.dim != 1:
        return NotImplemented
    blocks, team = split.spread.blocks, split.spread.team
    for name in ("weight", "bias"):
        given[name] = part_of(given.get(name), 0, blocks, team)
    statistics = {name: given[name] for name in ("running_mean", "running_var") if given.get(name) is not None}
    given |= {name: team.narrow(whole, 0, blocks).clone() for name, whole in statistics.items()}
    made = function(**given)
    if given.get("training") and statistics:
        fresh = team.gathered(torch.stack([given[name] for name in statistics]), 1, blocks)
        for whole, row in zip(statistics.values(), fresh, strict=True):
            whole.copy_(row)
    return made_of(made, 1, blocks, split)


@rule(F.group_norm)
def group_norm(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = ("input", "num_groups", "weight", "bias", "eps")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    split = given["input"]
    if not isinstance(split, Split) or split.spread.dim != 1 or len(split.spread.blocks) != 1:
        return NotImplemented
    blocks, team = split.spread.blocks, split.spread.team
    if not blocks[0].cut.serves(given["num_groups"]):
        return NotImplemented
    given["num_groups"] = team.local_length((Block(given["num_groups"], blocks[0].cut),))
    for name in ("weight", "bias"):
        given[name] = part_of(given.get(name), 0, blocks, team)
    return made_of(function(**given), 1, blocks, split)
