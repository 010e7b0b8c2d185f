"""Parts of tensors, and tensors put together of parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tricorn.mp.tensor.cut import Block, Blocks, length_of, pieces, same
from tricorn.mp.tensor.rules.operand import bound, ints, made_of, splits_in
from tricorn.mp.tensor.split import Call, Split, rule, shape_of


@rule(Tensor.expand, Tensor.expand_as)
def expand(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    split, *sizes = args
    if isinstance(sizes[0], Tensor):
        sizes = list(shape_of(sizes[0]) if isinstance(sizes[0], Split) else sizes[0].shape)
    new = ints(sizes)
    dim = split.spread.dim + len(new) - split.ndim
    if new[dim] not in (-1, length_of(split.spread.blocks)):
        return NotImplemented
    new[dim] = -1
    return made_of(split.expand(new), dim, split.spread.blocks, split)


@rule(Tensor.unbind, torch.unbind, Tensor.select, torch.select, Tensor.narrow, torch.narrow)
def along_another(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Operations along one dimension, which is not the divided one; all but ``narrow`` remove it."""
    split, dim = bound(args[:2], {name: kwargs[name] for name in kwargs if name == "dim"}, dim=0)
    if dim % split.ndim == split.spread.dim:
        return NotImplemented
    removes = function.__name__ != "narrow" and dim % split.ndim < split.spread.dim
    return made_of(function(*args, **kwargs), split.spread.dim - removes, split.spread.blocks, split)


@rule(Tensor.__iter__)
def iterate(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    parts = along_another(Tensor.unbind, args, {})
    return parts if parts is NotImplemented else iter(parts)


@rule(Tensor.chunk, torch.chunk, Tensor.split, torch.split, Tensor.tensor_split, torch.tensor_split)
def chunk(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    split, how, dim = args[0], (*args[1:2], *(v for n, v in kwargs.items() if n != "dim"))[0], _dim(args, kwargs, 2)
    if dim % split.ndim != split.spread.dim:
        return made_of(function(*args, **kwargs), split.spread.dim, split.spread.blocks, split)
    size = length_of(split.spread.blocks)
    lengths = [len(part) for part in function(torch.empty(1).expand(size), how)]
    return _in_pieces(split, lengths)


def _dim(args: tuple[Any, ...], kwargs: dict[str, Any], position: int) -> int:
    return int(args[position] if len(args) > position else kwargs.get("dim", 0))


def _in_pieces(split: Split, lengths: Sequence[int]) -> Any:
    """Consecutive parts of the divided dimension; NotImplemented where they are not whole blocks."""
    spread = split.spread
    found = pieces(spread.blocks, lengths)
    if found is None:
        spread.team.rearrange(spread.origins, spread.blocks, lengths)
        return NotImplemented
    parts = torch.split_with_sizes(split, [spread.team.local_length(blocks) for blocks in found], spread.dim)
    return tuple(made_of(part, spread.dim, blocks, split) for part, blocks in zip(parts, found, strict=True))


@rule(Tensor.__getitem__)
def getitem(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Slices, numbers, None and ellipsis."""
    split, index = args
    items = list(index) if isinstance(index, tuple) else [index]
    if not isinstance(split, Split) or not all(
        item is None or item is Ellipsis or isinstance(item, slice) or type(item) is int for item in items
    ):
        return NotImplemented
    given = sum(item is not None and item is not Ellipsis for item in items)
    where = items.index(Ellipsis) if Ellipsis in items else len(items)
    items[where : where + 1] = [slice(None)] * (split.ndim - given)
    place = [n for n, item in enumerate(items) if item is not None][split.spread.dim]
    made = sum(not isinstance(item, int) for item in items[:place])
    if items[place] == slice(None):
        return made_of(split[tuple(items)], made, split.spread.blocks, split)
    if not isinstance(items[place], slice):
        return NotImplemented
    return _sliced(split, items, place, made)


def _sliced(split: Split, items: list[Any], place: int, made: int) -> Any:
    """A slice of the divided dimension, if it is whole blocks."""
    size = length_of(split.spread.blocks)
    start, stop, step = items[place].indices(size)
    if step != 1 or stop <= start:
        return NotImplemented
    parts = _in_pieces(split, [length for length in (start, stop - start, size - stop) if length])
    if parts is NotImplemented:
        return NotImplemented
    part = parts[1 if start else 0]
    items[place] = slice(None)
    return made_of(Tensor.__getitem__(part, tuple(items)), made, part.spread.blocks, part)


@rule(torch.cat, torch.concat, torch.concatenate)
def cat(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    parts, dim = args[0], _dim(args, kwargs, 1)
    found = splits_in(parts)
    if len(found) < len(parts) or not _alike(found, but=dim):
        return NotImplemented
    first = found[0]
    if dim % first.ndim != first.spread.dim:
        return made_of(function(parts, dim), first.spread.dim, first.spread.blocks, *found)
    blocks: Blocks = tuple(block for part in found for block in part.spread.blocks)
    return made_of(function(parts, dim), first.spread.dim, blocks, *found)


@rule(torch.stack)
def stack(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    parts, dim = args[0], _dim(args, kwargs, 1)
    found = splits_in(parts)
    if len(found) < len(parts) or not _alike(found):
        return NotImplemented
    first = found[0]
    place = first.spread.dim + (dim % (first.ndim + 1) <= first.spread.dim)
    return made_of(function(parts, dim), place, first.spread.blocks, *found)


def _alike(found: Sequence[Split], but: int | None = None) -> bool:
    """Whether all are divided along the same dimension, and alike unless that is the one left out."""
    first = found[0]
    dim = first.spread.dim
    return all(part.spread.dim == dim for part in found) and (
        (but is not None and but % first.ndim == dim)
        or all(same(part.spread.blocks, first.spread.blocks) for part in found)
    )


@rule(Tensor.repeat_interleave, torch.repeat_interleave)
def repeat_interleave(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    split, repeats, dim = bound(args, kwargs, repeats=None, dim=None)
    if type(repeats) is not int or dim is None:
        return NotImplemented
    blocks = split.spread.blocks
    if dim % split.ndim == split.spread.dim:
        blocks = tuple(Block(block.length * repeats, block.cut) for block in blocks)
    return made_of(split.repeat_interleave(repeats, dim), split.spread.dim, blocks, split)
