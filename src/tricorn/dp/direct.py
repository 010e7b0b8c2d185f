"""Sum a gradient where it lies: each worker of a host writes its own into memory that all of them see.

Nothing runs beside backward, so two workers on two cores keep them to themselves; and the sum is taken block by block
on the way into the update, so it is never written to memory (docs/decisions/0009-gradients-in-shared-memory.md).

Legend: N elements of all trained parameters together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tricorn.state.flat import trained_parameters
from tricorn.state.gradient import squared_norm

if TYPE_CHECKING:
    from tricorn.comm.group import Group
    from tricorn.state.flat import Entry, FlatState

BLOCK = 1 << 17  # elements: a block of the sum is still in the cache when the update reads it


class DirectSum:
    """The gradient of a state, summed over a group of one host. ``exposed`` is from ``Group.expose(2 * N, ...)``.

    Call ``begin``, then one backward or none, then ``finish``; a step either ends with ``update`` or is abandoned.
    While it lives, backward's gradients are taken from the parameters, which keep none. All ranks add in rank order.
    """

    def __init__(self, state: FlatState, group: Group, exposed: Sequence[Tensor]) -> None:
        self._state = state
        self._group = group
        # Two of each, used in turn: who begins the next step may write while a slower one still reads.
        size = state.weights_N.numel()
        self._halves = [[both[:size] for both in exposed], [both[size:] for both in exposed]]
        self._turn = 0
        self._last = False  # whether what runs is the last backward of the step
        self._missing: set[Tensor] = set()
        trained = dict(trained_parameters(state.module))
        self._places: dict[Tensor, Entry] = {trained[entry.name]: entry for entry in state.entries}
        self._hooks = []
        for parameter in self._places:
            parameter.grad = None
            register: Callable[..., torch.utils.hooks.RemovableHandle] = parameter.register_post_accumulate_grad_hook
            self._hooks.append(register(self._take))

    def begin(self) -> None:
        """The backward that follows is the last of the step."""
        self._last, self._missing = True, set(self._places)

    def finish(self, status: Tensor) -> None:
        """Return when all ranks' gradients are there and ``status`` is a sum over them. Raises PeerLost."""
        for parameter in list(self._missing):
            if parameter.grad is None:
                self._place(parameter).zero_()
            else:
                self._take(parameter)
        self._group.all_reduce_now(status)
        self._last = False
        self._group.note_read(self._state.weights_N.nbytes * (self._group.size - 1))

    def squared_norm(self) -> float:
        """The squared L2 norm of the sum."""
        size = self._state.weights_N.numel()
        return sum(squared_norm(self._sum(slice(start, start + BLOCK))) for start in range(0, size, BLOCK))

    def update(self, factor: float, rate: float) -> None:
        """Make the next update with the sum times ``factor`` at that learning rate."""
        state = self._state
        for start in range(0, state.weights_N.numel(), BLOCK):
            part = slice(start, start + BLOCK)
            slots = {name: slot[part] for name, slot in state.slots.items()}
            grad = self._sum(part).mul_(factor)
            state.optimizer.update(state.weights_N[part], grad, slots, step=state.step + 1, lr=rate)
        state.step += 1
        self._turn = 1 - self._turn

    def abandon(self) -> None:
        """Forget what the step has computed; fail it for the whole group unless that has agreed on it already."""
        if self._last:
            self._group.interrupt()
        self._last = False
        for parameter in self._places:
            parameter.grad = None

    def close(self) -> None:
        """Leave the parameters' gradients alone, which become views of the state's again."""
        for hook in self._hooks:
            hook.remove()
        for parameter, entry in self._places.items():
            parameter.grad = self._state.grads_N[entry.start : entry.stop].view(entry.shape)

    def _take(self, parameter: Tensor) -> None:
        if not self._last:
            return
        assert parameter.grad is not None
        if parameter in self._missing:
            self._missing.remove(parameter)
            self._place(parameter).copy_(parameter.grad)
        else:  # a backward within the backward has come to it again
            self._place(parameter).add_(parameter.grad)
        parameter.grad = None

    def _place(self, parameter: Tensor) -> Tensor:
        entry = self._places[parameter]
        return self._halves[self._turn][self._group.rank][entry.start : entry.stop].view(entry.shape)

    def _sum(self, part: slice) -> Tensor:
        first, *others = (half[part] for half in self._halves[self._turn])
        if not others:
            return first
        total = first + others[0]
        for other in others[1:]:
            total += other
        return total
