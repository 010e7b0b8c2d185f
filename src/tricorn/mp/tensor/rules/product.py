"""Linear layers, products of matrices, convolutions and embeddings.

Where the sum of the product runs over a divided dimension, each shard has a part of the sum; otherwise each has a part
of the result. A whole factor of split results gets its gradient summed over the shards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tricorn.mp.tensor.cut import length_of, same
from tricorn.mp.tensor.rules.operand import beside, from_end, made_of, part_of, splits_in, unsplit
from tricorn.mp.tensor.split import Call, Split, rule, shape_of


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """As ``F.linear``; ``weight`` is [out, in]."""
    if not isinstance(weight, Split):
        assert isinstance(x, Split)
        if x.spread.dim == x.ndim - 1:
            return NotImplemented
        team = x.spread.team
        made = F.linear(x, team.shared(weight), None if bias is None else team.shared(bias))
        return made_of(made, x.spread.dim, x.spread.blocks, x)
    spread = weight.spread
    team = spread.team
    if spread.dim == 1:
        made = team.sum(F.linear(part_of(x, x.ndim - 1, spread.blocks, team), weight))
        bias = unsplit(bias, "")
        return made if bias is None else made.add_(bias)
    x = team.shared(unsplit(x, "linear"))
    bias = part_of(bias, 0, spread.blocks, team)
    split = made_of(F.linear(x, weight, bias), x.ndim - 1, spread.blocks, weight)
    return unsplit(split, "") if team.gathers(spread.origins) else split


@rule(F.linear)
def linear_rule(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return linear(*args, **kwargs)


@rule(torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.bmm, Tensor.bmm, torch.mm, Tensor.mm)
def matmul(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) != 2 or kwargs:
        return NotImplemented
    left, right = args if function is not Tensor.__rmatmul__ else args[::-1]
    if min(left.ndim, right.ndim) < 2:
        return NotImplemented
    split, other = (left, right) if isinstance(left, Split) else (right, left)
    place = from_end(split)
    if place < -2:
        fitting = beside(other, split, place)
        if fitting is None:
            return NotImplemented
        made = torch.matmul(*((split, fitting) if split is left else (fitting, split)))
        return made_of(made, made.ndim + place, split.spread.blocks, *splits_in(args))
    team, summed = split.spread.team, -1 if split is left else -2
    if place == summed:
        opposite = -3 - summed
        if isinstance(other, Split) and not (
            from_end(other) == opposite and same(other.spread.blocks, split.spread.blocks)
        ):
            return NotImplemented
        part = part_of(other, other.ndim + opposite, split.spread.blocks, team)
        return team.sum(torch.matmul(*((split, part) if split is left else (part, split))))
    if isinstance(other, Split):
        return NotImplemented
    shared = team.shared(other)
    made = torch.matmul(*((split, shared) if split is left else (shared, split)))
    return made_of(made, made.ndim + place, split.spread.blocks, split)


@rule(torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm)
def addmm(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A product and a sum, each by its own rule."""
    if kwargs or len(args) != 3:
        return NotImplemented
    bias, left, right = args
    with torch._C._EnableTorchFunction():
        return torch.matmul(left, right) + bias


@rule(torch.einsum, torch.functional.einsum)
def einsum(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], tuple | list):
        operands = list(operands[0])
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        return NotImplemented
    terms, result = equation.replace(" ", "").split("->")
    letters = terms.split(",")
    found = splits_in(operands)
    first = found[0]
    team, blocks = first.spread.team, first.spread.blocks
    if any(len(term) != operand.ndim for term, operand in zip(letters, operands, strict=True)):
        return NotImplemented
    letter = next(t[o.spread.dim] for t, o in zip(letters, operands, strict=True) if o is first)
    given: list[Any] = []
    for term, operand in zip(letters, operands, strict=True):
        if isinstance(operand, Split):
            if term[operand.spread.dim] != letter or not same(operand.spread.blocks, blocks):
                return NotImplemented
            given.append(operand)
        else:
            given.append(part_of(operand, term.index(letter), blocks, team) if letter in term else team.shared(operand))
    made = torch.einsum(equation, *given)
    return made_of(made, result.index(letter), blocks, *found) if letter in result else team.sum(made)


@rule(F.conv1d, F.conv2d, F.conv3d)
def convolution(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Channels: x [batch, channels, ...], weight [out, in / groups, ...]."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    x, weight, bias, groups = given["input"], given["weight"], given.get("bias"), given.get("groups", 1)
    if not isinstance(weight, Split) or x.ndim != weight.ndim or (x.spread.dim != 1 if isinstance(x, Split) else False):
        return NotImplemented
    blocks, team = weight.spread.blocks, weight.spread.team
    if weight.spread.dim == 1:
        if groups != 1:
            return NotImplemented
        made = team.sum(function(**given | {"input": part_of(x, 1, blocks, team), "bias": None}))
        bias = unsplit(bias, "")
        return made if bias is None else made.add_(bias.view(-1, *[1] * (made.ndim - 2)))
    if groups == 1:
        given["input"] = team.shared(unsplit(x, function.__name__))
    elif weight.size(1) == 1 and groups == shape_of(weight)[0] and isinstance(x, Split):
        given["input"] = part_of(x, 1, blocks, team)
        given["groups"] = team.local_length(blocks)
    else:
        return NotImplemented
    given["bias"] = part_of(bias, 0, blocks, team)
    made = made_of(function(**given), 1, blocks, *splits_in((weight, x)))
    return unsplit(made, "") if team.gathers(weight.spread.origins) else made


@rule(F.embedding)
def embedding(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Rows of a table whose rows are divided: each shard looks up those that it has."""
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    rows, weight = given["input"], given["weight"]
    if not isinstance(weight, Split) or isinstance(rows, Split) or weight.spread.dim != 0 or not plain_lookup(given):
        return NotImplemented
    team, blocks = weight.spread.team, weight.spread.blocks
    if team.shard is None:
        return team.sum(F.embedding(rows, weight, given.get("padding_idx")))
    start, stop = team.ranges(blocks)[0]
    padding = given.get("padding_idx")
    if padding is not None and padding < 0:  # counted from the end
        padding += length_of(blocks)
    own = padding - start if padding is not None and start <= padding < stop else None
    # The first and the last shard look for what is below and above all rows too, which is the user's mistake.
    elsewhere = rows < start if team.shard else torch.zeros_like(rows, dtype=torch.bool)
    if team.shard < team.shards - 1:
        elsewhere |= rows >= stop
    found = F.embedding((rows - start).masked_fill_(elsewhere, 0), weight, own)
    return team.sum(found.masked_fill(elsewhere.unsqueeze(-1), 0))


def plain_lookup(given: dict[str, Any]) -> bool:
    """Whether an embedding is only looked up: neither renormalised nor with gradients that depend on the others'."""
    return not (given.get("max_norm") is not None or given.get("scale_grad_by_freq") or given.get("sparse"))
