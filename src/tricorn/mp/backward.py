"""Backward from given gradients, without what ``torch.autograd.backward`` loads for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def backward(tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """As ``torch.autograd.backward(tensors, gradients)``; every tensor requires a gradient.

    That call compares shapes with ``torch.fx.experimental.symbolic_shapes``, whose import of sympy adds 0.35 s to the
    first step of every stage.
    """
    if tensors:
        torch.autograd.backward(_seed(gradients, *tensors))


class _Seed(torch.autograd.Function):
    """A scalar whose gradient with respect to the tensors is what was given."""

    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return torch.zeros((), device=tensors[0].device)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        return None, *ctx.gradients


_seed: Callable[..., Tensor] = _Seed.apply
