"""Attention by heads: each shard has some heads, all of it but the output projection is its own.

Legend: B batch, H heads of this shard, L queries, S keys, D width of a head, E width of the model.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tricorn.mp.tensor.cut import Block, same
from tricorn.mp.tensor.rules.elementwise import draws
from tricorn.mp.tensor.rules.operand import beside, from_end, made_of, part_of, splits_in, unsplit
from tricorn.mp.tensor.rules.product import linear
from tricorn.mp.tensor.split import Call, Split, rule, wrap

NAMES = (
    "query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k", "bias_v",
    "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias", "training", "key_padding_mask", "need_weights",
    "attn_mask", "use_separate_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "static_k", "static_v",
    "average_attn_weights", "is_causal",
)  # fmt: skip


@rule(F.scaled_dot_product_attention)
def scaled_dot_product(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    query, key, value = (given[name] for name in names[:3])
    found = splits_in((query, key, value))
    if len(found) < 3 or len({place := from_end(split) for split in found}) > 1 or place > -3:
        return NotImplemented
    if not same(key.spread.blocks, value.spread.blocks) or not _heads_match(query, key, given.get("enable_gqa", False)):
        return NotImplemented
    mask = given.get("attn_mask")
    given["attn_mask"] = beside(mask, query, place)
    if mask is not None and given["attn_mask"] is None:
        return NotImplemented
    with draws(query.spread.team, query.device, active=given.get("dropout_p", 0.0) > 0):
        made = function(**given)
    return made_of(made, query.spread.dim, query.spread.blocks, *found)


def _heads_match(query: Split, key: Split, grouped: bool) -> bool:
    """Whether each shard has the keys of its queries; in grouped attention several heads of queries share one."""
    q, k = query.spread.blocks, key.spread.blocks
    if not grouped:
        return same(q, k)
    return len(q) == len(k) == 1 and q[0].cut.matches(k[0].cut)


def splittable(given: dict[str, Any]) -> bool:
    """Whether nothing is asked of a multi-head attention that would go across its heads."""
    return not given["add_zero_attn"] and all(
        given.get(n) is None for n in ("bias_k", "bias_v", "static_k", "static_v")
    )


@rule(F.multi_head_attention_forward)
def multi_head(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = {**dict(zip(NAMES, args, strict=False)), **kwargs}
    out = given["out_proj_weight"]
    if not isinstance(out, Split) or not splittable(given):
        return NotImplemented
    query, key, value = (unsplit(given[name], "attention") for name in NAMES[:3])
    if batched := query.ndim == 3:
        alike = query is key and key is value
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        if alike:
            key = value = query
    team, heads, (block,) = out.spread.team, given["num_heads"], out.spread.blocks
    own = team.local_length((Block(heads, block.cut),))
    q, k, v = (torch.unflatten(x, -1, (own, -1)).transpose(-2, -3) for x in _projected(given, query, key, value))
    mask = _mask(given, q, own, heads)
    p = given["dropout_p"] if given.get("training", True) else 0.0
    with draws(team, q.device, active=p > 0):
        if given.get("need_weights", True):
            attended, weights = _with_weights(q, k, v, mask, p)
        else:
            causal = given.get("is_causal", False) and mask is None
            attended, weights = F.scaled_dot_product_attention(q, k, v, mask, p, causal), None
    made = linear(_split(attended.transpose(-2, -3).flatten(-2), out), out, given["out_proj_bias"])
    if batched:
        made = made.transpose(0, 1)
    if weights is not None:
        if given.get("average_attn_weights", True):
            weights = team.sum(weights.sum(-3)) / heads
        else:
            weights = team.gather(weights, weights.ndim - 3, (Block(heads, block.cut),))
    return made, weights


def _split(attended: Tensor, out: Split) -> Split:
    return wrap(attended, out.spread._replace(dim=attended.ndim - 1))


def _projected(given: dict[str, Any], query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """This shard's queries, keys and values, [..., L or S, H * D]."""
    if given.get("use_separate_proj_weight"):
        weights = [given[name] for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
        biases = (None, None, None) if given["in_proj_bias"] is None else given["in_proj_bias"].chunk(3)
        return tuple(_column(*each) for each in zip((query, key, value), weights, biases, strict=True))
    weight, bias = given["in_proj_weight"], given["in_proj_bias"]
    bias = part_of(bias, 0, weight.spread.blocks, weight.spread.team)
    if query is key and key is value:
        return _column(query, weight, bias).chunk(3, -1)
    parts = zip((query, key, value), weight.chunk(3), (None,) * 3 if bias is None else bias.chunk(3), strict=True)
    shared = weight.spread.team.shared
    return tuple(F.linear(shared(x), weight_, bias_) for x, weight_, bias_ in parts)


def _column(x: Tensor, weight: Split, bias: Tensor | None) -> Tensor:
    return F.linear(weight.spread.team.shared(x), weight, bias)


def _mask(given: dict[str, Any], q: Tensor, own: int, heads: int) -> Tensor | None:
    """What is added to the scores of this shard's heads, [..., 1 or H, L, S]; None if the causal kernel knows it."""
    padding, mask = given.get("key_padding_mask"), given.get("attn_mask")
    if given.get("is_causal") and mask is not None and padding is None and not given.get("need_weights", True):
        return None
    mask = _additive(mask, q.dtype)
    if mask is not None and mask.ndim == 3:
        mask = torch.unflatten(mask, 0, (-1, heads))
        team, (block,) = given["out_proj_weight"].spread.team, given["out_proj_weight"].spread.blocks
        mask = team.narrow(mask, 1, (Block(heads, block.cut),))
        mask = mask if q.ndim == 4 else mask[0]
    padding = _additive(padding, q.dtype)
    if padding is None:
        return mask
    padding = padding.unsqueeze(-2).unsqueeze(-2)
    return padding if mask is None else mask + padding


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def _with_weights(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> tuple[Tensor, Tensor]:
    scores = (q * math.sqrt(1 / q.size(-1))) @ k.transpose(-2, -1)
    weights = torch.softmax(scores if mask is None else scores + mask, -1)
    weights = F.dropout(weights, p) if p > 0 else weights
    return weights @ v, weights
