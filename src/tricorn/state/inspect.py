"""What a module contains that a strategy has to know of."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm


def batch_statistics(module: nn.Module) -> list[str]:
    """Names of the layers that keep statistics of the batch they see: of a worker's share, where there are several."""
    return [
        name or type(layer).__name__
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) or (isinstance(layer, _InstanceNorm) and layer.track_running_stats)
    ]
