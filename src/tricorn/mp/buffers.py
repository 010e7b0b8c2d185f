"""A module's buffers in a step: put back if it fails, and the same on all replicas when it is done."""

from __future__ import annotations

import torch
from torch import nn

from tricorn.comm.group import Group


class Buffers:
    """Those of a module as they are when a step begins."""

    def __init__(self, module: nn.Module) -> None:
        self._before = [(buffer, buffer._version, buffer.clone()) for buffer in module.buffers()]

    def restore(self) -> None:
        """As they were."""
        for buffer, _, before in self._before:
            buffer.copy_(before)

    def spread(self, copies: Group, source: int) -> None:
        """Take those that any replica has written from replica ``source``: what it writes depends on its share."""
        if not self._before:
            return
        changed = torch.tensor([float(buffer._version != version) for buffer, version, _ in self._before])
        copies.all_reduce_now(changed)
        for (buffer, *_), replicas in zip(self._before, changed.tolist(), strict=True):
            if replicas:
                sent = buffer.contiguous()
                copies.broadcast(sent, source)
                buffer.copy_(sent)
