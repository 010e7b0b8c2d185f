"""Linear layers whose backward writes the gradients of their parameters to where all workers see them.

PyTorch makes each gradient in new memory, from which it would have to be copied: 7 % of a step of the network of
benchmarks/dp.py (docs/decisions/0009-gradients-in-shared-memory.md).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Places(Protocol):
    """Where gradients go."""

    def claim(self, parameter: Tensor) -> tuple[Tensor, bool] | None:
        """Where the gradient that is about to be computed goes, and whether something is there already to which it is
        to be added; None if PyTorch has to make it.
        """


class InPlace:
    """Until ``close``, plain linear layers of the module ask ``places`` in each backward."""

    def __init__(self, module: nn.Module, places: Places) -> None:
        # Not subclasses, which may do something else, nor layers that somebody else has changed.
        own = (layer for layer in module.modules() if type(layer) is nn.Linear and "forward" not in vars(layer))
        self._layers = list(own)
        for layer in self._layers:
            # On the instance, so that the names and types of the user's modules stay as they are.
            vars(layer)["forward"] = _Forward(layer, places)

    def close(self) -> None:
        """May be called again."""
        for layer in self._layers:
            vars(layer).pop("forward", None)


class _Forward:
    """The forward of one layer. A copy of the layer has the usual one."""

    def __init__(self, layer: nn.Linear, places: Places) -> None:
        self._layer, self._places = layer, places

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (nn.Linear.forward, self._layer)

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self._layer.weight, self._layer.bias
        if torch.is_autocast_enabled(x.device.type) or torch._C._are_functorch_transforms_active():
            return F.linear(x, weight, bias)
        linear: Callable[..., Tensor] = _Linear.apply
        return linear(x, weight, bias, self._places)


class _Linear(torch.autograd.Function):
    """As ``F.linear``, by the same products; [..., I] to [..., O], the weight is [O, I]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, places: Places) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.parameters, ctx.places = (weight, bias), places  # what is saved may come back as another tensor
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad_MO, x_MI = grad.reshape(-1, weight.shape[0]), x.reshape(-1, weight.shape[1])
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = grad_MO.mm(weight).view(x.shape)
        if ctx.needs_input_grad[1]:
            of_weight = _put(ctx.places, ctx.parameters[0], partial(torch.mm, grad_MO.t(), x_MI))
        if ctx.needs_input_grad[2]:
            of_bias = _put(ctx.places, ctx.parameters[1], partial(torch.sum, grad_MO, 0))
        return of_x, of_weight, of_bias, None


def _put(places: Places, parameter: Tensor, compute: Callable[..., Tensor]) -> Tensor | None:
    """Have a gradient computed into its place; what is left for PyTorch to do."""
    # With create_graph the gradient may be differentiated itself.
    claimed = None if torch.is_grad_enabled() else places.claim(parameter)
    if claimed is None:
        return compute()
    place, more = claimed
    if more:
        place.add_(compute())
    else:
        compute(out=place)
    return None
