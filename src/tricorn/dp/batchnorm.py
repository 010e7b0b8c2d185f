"""Batch normalisation over the global batch: the statistics of each layer are summed over all workers.

So a layer normalises every worker's share with the mean and variance that one process would have found (Ioffe and
Szegedy 2015), weighted by the true counts, and gradients flow through them.

Legend: C channels; a message has 3 + 2 C numbers of float64, padded to the widest layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from tricorn.errors import PlanError
from tricorn.state.gradient import forward, tensors

if TYPE_CHECKING:
    from tricorn.comm.group import Group
    from tricorn.job import Job
    from tricorn.strategy import Batch

Summing = Callable[[Tensor], Tensor]


def global_layers(module: nn.Module) -> dict[str, _BatchNorm]:
    """The layers, by name, whose statistics can be summed: those whose forward is PyTorch's own."""
    own = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return {name: layer for name, layer in module.named_modules() if type(layer) in own}


class GlobalNorm:
    """Makes batch normalisation of a module global while it trains.

    Between ``begin`` and ``finish`` each worker runs one forward and one backward of its share; one without samples
    runs none, and takes part in the sums all the same. Raises PlanError if the shares do not go through the same
    layers in the same order.
    """

    def __init__(self, module: nn.Module) -> None:
        self._layers = list(global_layers(module).values())
        self._width = max((layer.num_features for layer in self._layers), default=0)
        self._group: Group | None = None
        self._present = 0
        self.waited = 0.0  # seconds in sums, altogether
        for number, layer in enumerate(self._layers):
            # On the instance, so that the names and types of the user's modules stay as they are.
            vars(layer)["forward"] = partial(self._forward, number, layer)

    def __bool__(self) -> bool:
        return bool(self._layers)

    def begin(self, group: Group, *, present: int) -> None:
        """``present``: how many workers have samples in the step that begins."""
        self._group, self._present = group, present

    def finish(self, *, here: bool) -> None:
        """``here``: this worker had samples, and has done with them. Else it keeps the others company now."""
        if here:
            self._meet(None, torch.zeros(0))
        else:
            while (met := self._meet(None, torch.zeros(0))) is not None:
                number, total = met
                if number % 2 == 0:
                    layer = self._layers[number // 2]
                    self._track(layer, *_moments(total[: 1 + 2 * layer.num_features]))
        self._group = None

    def abandon(self) -> None:
        """Fail the step for the whole group."""
        if self._group is not None:
            self._group.interrupt()
        self._group = None

    def _meet(self, number: int | None, values: Tensor) -> tuple[int, Tensor] | None:
        """Sum one message over the workers: what those that compute are at, and its sum; None if all have done."""
        assert self._group is not None
        message = torch.zeros(3 + 2 * self._width, dtype=torch.float64)
        if number is not None:
            message[0], message[1] = 1, number
            message[2 : 2 + len(values)] = values
        began = time.perf_counter()
        self._group.all_reduce_now(message)
        self.waited += time.perf_counter() - began
        working, numbers = int(message[0]), int(message[1])
        if working not in (0, self._present) or (number is not None and numbers != working * number):
            raise PlanError(
                "the workers' shares of a batch went through different batch normalisation layers, or through them in "
                "another order, so their statistics cannot be summed; use GroupNorm or LayerNorm, or one worker"
            )
        return (numbers // working, message[2:]) if working else None

    def _summed(self, number: int, values: Tensor) -> Tensor:
        met = self._meet(number, values)
        assert met is not None
        return met[1][: len(values)]

    def _forward(self, number: int, layer: _BatchNorm, x: Tensor) -> Tensor:
        if not layer.training or self._group is None:
            return type(layer).forward(layer, x)
        check: Callable[[Tensor], None] = layer._check_input_dim
        check(x)
        given, x = x.dtype, x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        count = x.numel() // x.shape[1]
        with torch.no_grad():
            variance_C, mean_C = torch.var_mean(x, _others(x), correction=0)
            mean, squares = mean_C.double() * count, (variance_C.double() + mean_C.double() ** 2) * count
            message = torch.cat([torch.tensor([float(count)], dtype=torch.float64), mean.cpu(), squares.cpu()])
            total, mean_C, variance_C = _moments(self._summed(2 * number, message))
            self._track(layer, total, mean_C, variance_C)
            statistics = mean_C.to(x), torch.rsqrt(variance_C + layer.eps).to(x)
        summing = partial(self._summed, 2 * number + 1)
        normalise: Callable[..., Tensor] = _Normalise.apply
        return normalise(x, layer.weight, layer.bias, *statistics, total, summing).to(given)

    def _track(self, layer: _BatchNorm, total: float, mean_C: Tensor, variance_C: Tensor) -> None:
        """Move the running statistics as one process would."""
        if total <= 1:
            raise ValueError("batch normalisation needs more than one value for each channel to train")
        if not layer.track_running_stats or layer.running_mean is None or layer.running_var is None:
            return
        assert layer.num_batches_tracked is not None
        layer.num_batches_tracked.add_(1)
        rate = 1 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
        layer.running_mean.lerp_(mean_C.to(layer.running_mean), rate)
        layer.running_var.lerp_((variance_C * (total / (total - 1))).to(layer.running_var), rate)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_C: Tensor | None, bias_C: Tensor | None, mean_C: Tensor, scale_C: Tensor,
        total: float, summing: Summing,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight_C, mean_C, scale_C)
        ctx.total, ctx.summing = total, summing
        return F.batch_norm(x, mean_C, scale_C.pow(-2), weight_C, bias_C, training=False, eps=0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_C, mean_C, scale_C = ctx.saved_tensors
        shape = [1, -1] + [1] * (x.ndim - 2)
        normal = (x - mean_C.view(shape)) * scale_C.view(shape)
        bias_grad_C = grad.sum(_others(x))
        weight_grad_C = (grad * normal).sum(_others(x))
        sums = ctx.summing(torch.cat([bias_grad_C, weight_grad_C]).double().cpu()).to(x) / ctx.total
        along, across = sums.view(2, -1)
        scale = scale_C if weight_C is None else scale_C * weight_C
        x_grad = (grad - along.view(shape) - normal * across.view(shape)) * scale.view(shape)
        if weight_C is None:
            return x_grad, None, None, None, None, None, None
        return x_grad, weight_grad_C, bias_grad_C, None, None, None, None


def _moments(sums: Tensor) -> tuple[float, Tensor, Tensor]:
    """Count, mean and (biased) variance from the sums [1 + 2 C] of ones, values and squares."""
    total = float(sums[0])
    mean_C, square_C = sums[1:].view(2, -1) / total
    return total, mean_C, (square_C - mean_C**2).clamp_(min=0)


def _others(x: Tensor) -> list[int]:
    """All dimensions but that of the channels."""
    return [dim for dim in range(x.ndim) if dim != 1]


def nothing(job: Job, module: nn.Module, batch: Batch) -> Tensor:
    """The loss of a share that does not count: zero, for the mean over nothing is not a number.

    Its activations are part of the statistics all the same, and its backward of their sums.
    """
    output = forward(job, module, batch)
    return torch.stack([part.sum() for part in tensors(output) if part.requires_grad]).sum() * 0.0
