"""Cross-entropy over classes that are divided: three numbers a row travel, never the logits.

Legend: N rows, C this shard's classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tricorn.mp.tensor.cut import length_of
from tricorn.mp.tensor.split import Call, Split, rule
from tricorn.mp.tensor.team import Team


def log_sum_exp(logits: Tensor, team: Team) -> Tensor:
    """Over the last dimension, of all shards: whole, as is its gradient."""
    return _rows(logits, None, team)[0]


class _Rows(torch.autograd.Function):
    """Of logits [N, C] and classes [N], this shard's or -1: the log of the sum of exp over all shards, and the logit
    of the class, [N] each.
    """

    @staticmethod
    def forward(ctx: Any, logits_NC: Tensor, own_N: Tensor | None, team: Team) -> tuple[Tensor, Tensor]:
        highest_N = logits_NC.amax(-1)
        exps_NC = (logits_NC - highest_N.unsqueeze(-1)).exp_()
        logit_N = torch.zeros_like(highest_N)
        if own_N is not None:
            logit_N = logits_NC.gather(-1, own_N.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill_(own_N < 0, 0)
        # Every shard fills in its row, so that one sum tells all of them everything.
        told = logits_NC.new_zeros(team.shards, 3, *highest_N.shape)
        told[team.shard or 0] = torch.stack((highest_N, exps_NC.sum(-1), logit_N))
        highest, sums, chosen = team.sum(told).unbind(1)
        if team.shard is None:
            highest, sums = highest[:1], sums[:1]
        top_N = highest.amax(0)
        total_N = top_N + (sums * (highest - top_N).exp()).sum(0).log()
        ctx.save_for_backward(exps_NC, (highest_N - total_N).exp(), own_N)
        return total_N, chosen.sum(0)

    @staticmethod
    def backward(ctx: Any, total_N: Tensor, chosen_N: Tensor) -> Any:
        exps_NC, scale_N, own_N = ctx.saved_tensors
        gradient_NC = exps_NC * (scale_N * total_N).unsqueeze(-1)
        if own_N is not None:
            mine = chosen_N.masked_fill(own_N < 0, 0).unsqueeze(-1)
            gradient_NC.scatter_add_(-1, own_N.clamp(min=0).unsqueeze(-1), mine)
        return gradient_NC, None, None


_rows: Callable[..., tuple[Tensor, Tensor]] = _Rows.apply


@rule(F.cross_entropy)
def cross_entropy(function: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    split, target = given["input"], given["target"]
    dim, blocks, team, _ = split.spread if isinstance(split, Split) else (-1, (), None, None)
    if (
        team is None or isinstance(target, Split) or dim != min(1, split.ndim - 1) or target.is_floating_point()
        or len(blocks) != 1 or any(given.get(name) is not None for name in ("weight", "size_average", "reduce"))
    ):  # fmt: skip
        return NotImplemented
    classes, ignored = length_of(blocks), given.get("ignore_index", -100)
    counted = target != ignored
    if bool(((target < 0) | (target >= classes))[counted].any()):
        return NotImplemented  # for the error that torch raises
    logits = split.movedim(dim, -1)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    start, stop = team.ranges(blocks)[0]
    own = (target - start).masked_fill(~counted | (target < start) | (target >= stop), -1)
    total, chosen = _rows(logits, own, team)
    losses = total - chosen
    if smoothing := given.get("label_smoothing", 0.0):
        losses = (1 - smoothing) * losses + smoothing * (total - team.sum(logits.sum(-1)) / classes)
    losses = losses.masked_fill(~counted, 0)
    reduction = given.get("reduction", "mean")
    if reduction == "none":
        return losses
    return losses.sum() / counted.sum() if reduction == "mean" else losses.sum()
