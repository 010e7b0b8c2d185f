"""Weight gradients of linear layers, computed apart from those of their inputs: later, and into the sum at once.

A stage owes its neighbour the gradient of what it was given; that of its weights only the optimizer waits for. So what
the neighbour needs is computed and sent first, and the weights' part when there is nothing better to do (Qi et al.
2023, zero-bubble pipelines). It is cheaper than autograd's, too. The product goes into the sum of the gradients
directly (``addmm_``) and not by way of a temporary. And microbatches of few rows are put together until they have
``ENOUGH``: the sum of the gradients, as large as the weights, is then read and written once for all of them.

Legend: R rows of a microbatch (all leading dims together), I inputs, O outputs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Elements of a weight below which the detour through Python costs more than it saves.
FEWEST = 1 << 14
ENOUGH = 128  # rows


class Deferral:
    """The weight gradients that wait: as long as ``waiting`` is a list, else they are computed as rows are enough."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] | None = None
        self._gathered: dict[tuple[int, int], _Rows] = {}

    def install(self, module: nn.Module) -> None:
        """Let the ``nn.Linear`` layers in the module work so. Their weights need a ``grad`` to add to."""
        for layer in module.modules():
            if isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward:
                # Comes before its class's. A weak reference: a model in a circle would be freed late.
                layer.__dict__["forward"] = partial(self._linear, weakref.ref(layer))

    @property
    def together(self) -> int:
        """How many microbatches like the one that is gathered are put together."""
        return -(-ENOUGH // min((rows.count for rows in self._gathered.values()), default=ENOUGH))

    def begin(self) -> None:
        """Forget what a step that failed has left."""
        self._gathered.clear()

    def finish(self) -> None:
        """Compute all that is still gathered."""
        for rows in self._gathered.values():
            rows.add()
        self._gathered.clear()

    def put(self, weight: Tensor, bias: Tensor | None, x: Tensor, gradient: Tensor) -> None:
        """Add to the ``grad`` of both, in time, what they have of inputs ``x`` and the gradient of the output."""
        work = partial(self._gather, weight, bias, x, gradient)
        if self.waiting is None:
            work()
        else:
            self.waiting.append(work)

    def _gather(self, weight: Tensor, bias: Tensor | None, x: Tensor, gradient: Tensor) -> None:
        key = id(weight), id(bias)
        rows = self._gathered.setdefault(key, _Rows(weight, bias))
        rows.x.append(x.reshape(-1, x.shape[-1]))
        rows.gradient.append(gradient.reshape(-1, gradient.shape[-1]))
        if rows.count >= ENOUGH:
            self._gathered.pop(key).add()

    def _linear(self, of: weakref.ref[nn.Linear], x: Tensor) -> Tensor:
        layer = of()
        assert layer is not None
        weight, bias = layer.weight, layer.bias
        # A subclass of Tensor has its own way of computing.
        apart = type(x) is Tensor and torch.is_grad_enabled() and weight.numel() >= FEWEST
        if apart and _plain(weight) and (bias is None or _plain(bias)):
            made: Tensor = _linear(x, weight, bias, self)
            return made
        return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, deferral: Deferral) -> Tensor:
        made = F.linear(x, weight, bias)
        ctx.save_for_backward(x.to(made.dtype))  # autocast computes in another type than the weights'
        ctx.weight, ctx.bias, ctx.deferral = weight, bias, deferral
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        ctx.deferral.put(ctx.weight, ctx.bias, x, gradient)
        back = gradient @ ctx.weight.to(gradient.dtype) if ctx.needs_input_grad[0] else None
        return back, None, None, None


_linear: Callable[..., Tensor] = _Linear.apply


@dataclass
class _Rows:
    """What a layer was given, and the gradients of what it made of it."""

    weight: Tensor
    bias: Tensor | None
    x: list[Tensor] = field(default_factory=list)
    gradient: list[Tensor] = field(default_factory=list)

    @property
    def count(self) -> int:
        return sum(map(len, self.x))

    @torch.no_grad()
    def add(self) -> None:
        """Add the gradients of the sum over rows to the ``grad`` of both."""
        x_RI, gradient_RO = (each[0] if len(each) == 1 else torch.cat(each) for each in (self.x, self.gradient))
        assert self.weight.grad is not None
        if self.weight.grad.dtype == gradient_RO.dtype:
            self.weight.grad.addmm_(gradient_RO.T, x_RI)
        else:
            self.weight.grad.add_(gradient_RO.T @ x_RI)
        if self.bias is not None:
            assert self.bias.grad is not None
            self.bias.grad.add_(gradient_RO.sum(0))


def _plain(parameter: Tensor) -> bool:
    """Whether nobody but the sum of its gradients waits for its gradient."""
    return (
        parameter.requires_grad
        and parameter.is_leaf
        and parameter.grad is not None
        and not parameter._backward_hooks
        and not parameter._post_accumulate_grad_hooks
    )
