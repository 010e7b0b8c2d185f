"""A module's buffers in a step: put back if it fails, and the same on all workers when it is done.

What a forward writes into a buffer depends on its share of the batch. All take what the first worker with samples
has; running statistics of batch normalisation are equal by themselves (batchnorm.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from tricorn.dp.batchnorm import global_layers

if TYPE_CHECKING:
    from tricorn.comm.group import Group


class Buffers:
    """``begin`` a step, then either ``restore``, or ``spread`` what was ``changed`` anywhere."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        equal = {
            f"{layer}.{name}".lstrip(".")
            for layer, norm in global_layers(module).items()
            for name, _ in norm.named_buffers()
        }
        self._shared = [name for name, _ in module.named_buffers() if name not in equal]
        self._before: list[tuple[str, Tensor, int, Tensor]] = []

    def begin(self) -> None:
        self._before = [(name, b, b._version, b.clone()) for name, b in self._module.named_buffers()]

    def restore(self) -> None:
        """As they were at ``begin``."""
        for (_, _, _, before), buffer in zip(self._before, self._module.buffers(), strict=True):
            buffer.copy_(before)

    def changed(self) -> list[float]:
        """1.0 for each buffer that this worker has written since ``begin`` and that is not equal by itself."""
        if not self._shared:
            return []
        before = {name: (buffer, version) for name, buffer, version, _ in self._before}
        now = dict(self._module.named_buffers())
        return [
            float(now[name] is not before[name][0] or now[name]._version != before[name][1]) for name in self._shared
        ]

    def spread(self, group: Group, changed: Sequence[float], source: int) -> None:
        """Take those buffers from rank ``source``; ``changed`` is summed over the workers."""
        if not any(changed):
            return
        now = dict(self._module.named_buffers())
        for name, workers in zip(self._shared, changed, strict=True):
            if workers:
                sent = now[name].contiguous()
                group.broadcast(sent, source)
                now[name].copy_(sent)
