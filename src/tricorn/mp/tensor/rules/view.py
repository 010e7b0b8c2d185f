"""What a tensor is, and views and permutations of it."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from tricorn.mp.tensor.cut import viewed
from tricorn.mp.tensor.rules.operand import bound, ints, made_of
from tricorn.mp.tensor.split import Call, Split, rule, shape_of

_BASE = vars(torch._C.TensorBase)
_ATTRIBUTES = (
    "dtype device layout requires_grad grad_fn is_leaf is_cuda is_cpu is_meta is_sparse is_sparse_csr is_nested "
    "grad itemsize is_quantized is_mkldnn is_xla is_mps ndim _version _base retains_grad _backward_hooks output_nr"
)
_METHODS = (
    "dim is_floating_point is_complex is_contiguous element_size register_hook retain_grad stride __repr__ __hash__ "
    "is_inference is_signed untyped_storage new_zeros new_ones new_empty new_full new_tensor"
)


@rule(
    *(_BASE[name].__get__ for name in _ATTRIBUTES.split()),
    *(getattr(Tensor, name) for name in _METHODS.split()),
    torch.is_floating_point,
    torch.is_complex,
)
def of_the_part(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(*args, **kwargs)


@rule(_BASE["shape"].__get__, Tensor.size)
def size(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    shape = torch.Size(shape_of(args[0]))
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return shape if dim is None else shape[dim]


@rule(Tensor.numel, Tensor.nelement, torch.numel)
def numel(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    return prod(shape_of(args[0]))


@rule(Tensor.__len__)
def length(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    return shape_of(args[0])[0]


def view_as(split: Split, shape: Sequence[int]) -> Any:
    """The tensor viewed in that whole shape, of which one size may be -1; NotImplemented if its parts cannot be."""
    old, new = shape_of(split), list(shape)
    if -1 in new:
        new[new.index(-1)] = prod(old) // max(1, -prod(new))
    if prod(old) != prod(new) or not prod(old):
        return NotImplemented
    spread = split.spread
    before = new[: spread.dim]
    if before == old[: spread.dim] and spread.team.regroup(spread.origins, spread.blocks, new[spread.dim :]):
        return NotImplemented
    found = viewed(tuple(old), spread.dim, spread.blocks, tuple(new))
    if found is None:
        return NotImplemented
    dim, blocks = found
    new[dim] = spread.team.local_length(blocks)
    return made_of(split.reshape(new), dim, blocks, split)


@rule(Tensor.view, Tensor.reshape, torch.reshape, Tensor.view_as, Tensor.reshape_as)
def view(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    split, *shape = args
    if not isinstance(split, Split) or kwargs or isinstance(shape[0], torch.dtype):
        return NotImplemented
    if isinstance(shape[0], Tensor):
        return view_as(split, shape_of(shape[0]) if isinstance(shape[0], Split) else shape[0].shape)
    return view_as(split, ints(shape))


@rule(Tensor.flatten, torch.flatten)
def flatten(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    split, start, stop = bound(args, kwargs, start_dim=0, end_dim=-1)
    shape = shape_of(split)
    start, stop = start % len(shape), stop % len(shape)
    return view_as(split, [*shape[:start], prod(shape[start : stop + 1]), *shape[stop + 1 :]])


@rule(Tensor.unflatten, torch.unflatten)
def unflatten(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    split, dim, sizes = bound(args, kwargs, dim=0, sizes=())
    shape = shape_of(split)
    dim, sizes = dim % len(shape), list(sizes)
    if -1 in sizes:
        sizes[sizes.index(-1)] = shape[dim] // max(1, -prod(sizes))
    return view_as(split, [*shape[:dim], *sizes, *shape[dim + 1 :]])


def _permuted(split: Split, order: Sequence[int]) -> Any:
    dims = [dim % split.ndim for dim in order]
    return made_of(split.permute(dims), dims.index(split.spread.dim), split.spread.blocks, split)


@rule(Tensor.permute, torch.permute)
def permute(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _permuted(args[0], ints(args[1:] or tuple(kwargs.values())))


@rule(Tensor.transpose, torch.transpose, Tensor.swapaxes, torch.swapaxes, Tensor.swapdims, torch.swapdims)
def transpose(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    split, left, right = (*args, *kwargs.values())
    order = list(range(split.ndim))
    order[left], order[right] = order[right], order[left]
    return _permuted(split, order)


@rule(Tensor.t, torch.t, _BASE["T"].__get__, _BASE["mT"].__get__, torch.adjoint)
def transposed(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    split = args[0]
    if split.ndim < 2:
        return NotImplemented
    order = list(range(split.ndim))
    if function == _BASE["T"].__get__:
        return _permuted(split, order[::-1])
    order[-2:] = order[:-3:-1]
    return _permuted(split, order)


@rule(Tensor.movedim, torch.movedim, Tensor.moveaxis, torch.moveaxis)
def movedim(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    split, *ends = (*args, *kwargs.values())
    sources, targets = ([end] if isinstance(end, int) else list(end) for end in ends)
    places = dict(zip((t % split.ndim for t in targets), (s % split.ndim for s in sources), strict=True))
    others = iter(dim for dim in range(split.ndim) if dim not in places.values())
    return _permuted(split, [places[dim] if dim in places else next(others) for dim in range(split.ndim)])


@rule(Tensor.unsqueeze, torch.unsqueeze)
def unsqueeze(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    split, dim = (*args, *kwargs.values())
    place = dim % (split.ndim + 1)
    shift = place <= split.spread.dim
    return made_of(split.unsqueeze(dim), split.spread.dim + shift, split.spread.blocks, split)


@rule(Tensor.squeeze, torch.squeeze)
def squeeze(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    split, dims = bound(args, kwargs, dim=None)
    wanted = range(split.ndim) if dims is None else [dims] if isinstance(dims, int) else dims
    shape = shape_of(split)
    gone = tuple({dim % split.ndim for dim in wanted if shape[dim] == 1})
    moved = split.spread.dim - sum(dim < split.spread.dim for dim in gone)
    return made_of(split.squeeze(gone), moved, split.spread.blocks, split)
