"""Whole tensors as operands beside split ones, and results that are split as their operands are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from tricorn.mp.tensor.cut import Blocks, same
from tricorn.mp.tensor.split import Split, Spread, gather, wrap
from tricorn.mp.tensor.team import Team


def splits_in(values: Iterable[Any]) -> list[Split]:
    return [value for value in values if isinstance(value, Split)]


def from_end(split: Split) -> int:
    """The divided dimension, counted from the last, as broadcasting does: -1 is the last."""
    return split.spread.dim - split.ndim


def made_of(result: Any, dim: int, blocks: Blocks, *sources: Split) -> Any:
    """A tensor, or a tuple or list of them, that was made of these sources, and is divided along ``dim``."""
    if isinstance(result, Split) or not isinstance(result, Tensor):
        if isinstance(result, tuple | list):
            parts = [made_of(part, dim, blocks, *sources) for part in result]
            return type(result)(parts) if type(result) in (tuple, list) else type(result)(*_fields(result, parts))
        return result
    spread = sources[0].spread
    if dim == spread.dim and blocks is spread.blocks and len(sources) == 1:
        return wrap(result, spread)
    origins = spread.origins.union(*(source.spread.origins for source in sources)) if spread.origins else spread.origins
    return wrap(result, Spread(dim, blocks, spread.team, origins))


def _fields(result: Any, parts: list[Any]) -> tuple[Any, ...]:
    return (parts,) if type(result).__module__ == "torch.return_types" else tuple(parts)


def unsplit(value: Any, why: str) -> Any:
    """The tensor on all shards, if it is split."""
    return gather(value, why) if isinstance(value, Split) else value


def part_of(value: Any, dim: int, blocks: Blocks, team: Team) -> Any:
    """A tensor (or None) of which dimension ``dim`` is wanted as these blocks: its part, whether it is split or not."""
    if isinstance(value, Split):
        if value.spread.dim == dim and same(value.spread.blocks, blocks):
            return value
        value = gather(value, "an operation with a value that is split otherwise")
    return None if value is None else team.slice(value, dim, blocks)


def beside(other: Any, split: Split, place: int) -> Any:
    """The operand as it goes with a split one whose dimension ``place`` (from the end) is divided; None if it does not.

    A whole one gives its part of that dimension, or all of it where it is broadcast along it.
    """
    if not isinstance(other, Tensor) or other is split:
        return other
    if isinstance(other, Split):
        return other if from_end(other) == place and same(other.spread.blocks, split.spread.blocks) else None
    team = split.spread.team
    if other.ndim < -place or other.shape[place] == 1:
        return team.shared(other)
    if other.requires_grad:
        team.stopped(split.spread.origins, "an operation with a value that is not split", sliced=True)
    return team.slice(other, other.ndim + place, split.spread.blocks)


def ints(values: Sequence[Any]) -> list[int]:
    """Numbers given one by one or as one sequence."""
    return [int(v) for v in (values[0] if len(values) == 1 and isinstance(values[0], Sequence) else values)]


def bound(args: tuple[Any, ...], kwargs: dict[str, Any], **defaults: Any) -> list[Any]:
    """The first argument, and those named, by position, by name or by default."""
    named = {**defaults, **dict(zip(defaults, args[1:], strict=False)), **kwargs}
    return [args[0], *(named[name] for name in defaults)]
