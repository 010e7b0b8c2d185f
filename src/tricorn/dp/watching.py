"""Hearing from backward that a parameter's gradient is there."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakMethod

from torch import Tensor
from torch.utils.hooks import RemovableHandle


def watch(parameter: Tensor, hear: Callable[[Tensor], None]) -> RemovableHandle:
    """Call the bound method ``hear`` with the parameter whenever backward has accumulated its gradient.

    It is held weakly. PyTorch keeps such a hook where Python's collector does not look, so a strong one would keep the
    listener, and the memory of its group, for as long as the process lives.
    """
    listener = WeakMethod(hear)

    def tell(parameter: Tensor) -> None:
        if (listening := listener()) is not None:
            listening(parameter)

    register: Callable[..., RemovableHandle] = parameter.register_post_accumulate_grad_hook
    return register(tell)
