"""The state of all replicas of one host, held once in memory that all of them see: each worker updates its part of it.

It is updated in place, block by block, and a worker may die at any moment of that. What it was to do is known to all,
since they had agreed on the step and see its gradient; so the others do it themselves. How far it had come, and what
was in the block that it was writing, it noted in shared memory (docs/decisions/0009-gradients-in-shared-memory.md).

Legend: N elements of all trained parameters together, T tensors of the state (the weights and the optimizer's slots).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tricorn.errors import PeerLost
from tricorn.state.flat import trained_parameters

if TYPE_CHECKING:
    from tricorn.comm.group import Group
    from tricorn.state.flat import FlatState

BLOCK = 1 << 16  # elements: what is read and written of a block stays in the cache between its operations
ALIGNED = 1 << 10  # elements: no two workers write to the same page

_PARAM, _SLOT = "param", "optim/"  # as FlatState.tensors names them


class _Block(NamedTuple):
    """One block of an update."""

    grads: list[Tensor]  # by rank
    grad: Tensor  # room for their sum
    tensors: list[Tensor]  # the weights, then the slots
    slots: dict[str, Tensor]
    journal: list[Tensor]  # room for what the tensors hold before the update


class SharedState:
    """Holds the tensors of a ``FlatState`` from when it is made until ``leave``; all ranks make it at once.

    ``grads``: the gradient of each rank, [N], in shared memory, or of the only one. ``parts``: (start, stop) of what
    each rank updates. ``left``: whether the state lies in memory of its own again.
    """

    def __init__(self, state: FlatState, group: Group, grads: Sequence[Tensor]) -> None:
        self._state = state
        self._group = group
        self._grads = grads
        size = len(state.weights_N)
        cuts = [size * rank // group.size // ALIGNED * ALIGNED for rank in range(group.size)]
        self.parts = list(pairwise([*cuts, size]))
        self.left = group.size == 1
        trained = dict(trained_parameters(state.module))
        self._parameters = [(trained[entry.name], entry) for entry in state.entries]
        self._held = state.tensors()
        self._journals = [torch.empty(0)] * group.size
        if not self.left:
            self._share()
        self._blocks = self._plan(group.rank, self._held)

    def squared_norm(self) -> float:
        """The squared L2 norm of the summed gradient, in float64. Raises PeerLost."""
        square = torch.zeros(1, dtype=torch.float64)
        for block in self._blocks:
            wide = _sum(block).double()
            square += wide.dot(wide)
        self._group.all_reduce_now(square)
        return square.item()

    def update(self, factor: float, rate: float) -> None:
        """Do this worker's part of the update with the summed gradient times ``factor`` at that learning rate."""
        for number, block in enumerate(self._blocks):
            if not self.left:
                torch._foreach_copy_(block.journal, block.tensors)
                self._note(2 * number + 1)
            self._apply(block, factor, rate)
            if not self.left:
                self._note(2 * number + 2)

    def commit(self, factor: float, rate: float) -> None:
        """Return when all parts are done: those of lost peers by this worker, in memory of its own."""
        try:
            self._group.barrier()
        except PeerLost:
            self._finish_alone(factor, rate)
        self._state.step += 1

    def leave(self) -> bool:
        """Take the state into memory of its own. False if a peer has begun to update it: then it is of no step."""
        if self.left:
            return True
        held = {name: tensor.clone() for name, tensor in self._held.items()}
        untouched = not any(self._noted(rank) for rank in range(self._group.size))
        self._adopt(held)
        self.left = True
        return untouched

    def _share(self) -> None:
        """Move the state into shared memory."""
        from tricorn.comm import words

        self._words = words
        size, count, dtype = len(self._state.weights_N), len(self._held), self._state.weights_N.dtype
        self._journals = self._expose(count * BLOCK, dtype)
        self._notes = self._expose(1, torch.int64)
        rooms = self._expose(count * size, dtype)[0].view(count, size)
        shared = dict(zip(self._held, rooms, strict=True))
        if self._group.rank == 0:
            for name, tensor in self._held.items():
                shared[name].copy_(tensor)
        self._group.barrier()
        self._adopt(shared)

    def _expose(self, elements: int, dtype: torch.dtype) -> list[Tensor]:
        exposed = self._group.expose(elements, dtype)
        assert exposed is not None, "the gradients are in shared memory"
        return exposed

    def _plan(self, rank: int, held: dict[str, Tensor]) -> list[_Block]:
        """The blocks of what a rank updates, in such tensors."""
        start, stop = self.parts[rank]
        room = torch.empty(BLOCK, dtype=self._state.weights_N.dtype)
        found = []
        for low in range(start, stop, BLOCK):
            part = slice(low, min(low + BLOCK, stop))
            tensors = {name: tensor[part] for name, tensor in held.items()}
            journal = [row[: part.stop - low] for row in self._journals[rank].view(-1, BLOCK)]
            slots = {slot: tensors[_SLOT + slot] for slot in self._state.slots}
            grads = [grad[part] for grad in self._grads]
            found.append(_Block(grads, room[: part.stop - low], [*tensors.values()], slots, journal))
        return found

    def _apply(self, block: _Block, factor: float, rate: float) -> None:
        grad = _sum(block).mul_(factor)
        self._state.optimizer.update(block.tensors[0], grad, block.slots, step=self._state.step + 1, lr=rate)

    def _note(self, progress: int) -> None:
        """Let the others know: 2 k when k blocks are done, 2 k + 1 while the next is written and the journal has it."""
        self._words.store(self._notes[self._group.rank].data_ptr(), self._state.step << 32 | progress)

    def _noted(self, rank: int) -> int:
        step, progress = divmod(self._words.load(self._notes[rank].data_ptr()), 1 << 32)
        return progress if step == self._state.step else 0

    def _finish_alone(self, factor: float, rate: float) -> None:
        held = {name: tensor.clone() for name, tensor in self._held.items()}
        for rank in range(self._group.size):
            blocks = self._plan(rank, held)
            for block in blocks[self._copy_part(rank, held, blocks) :]:
                self._apply(block, factor, rate)
        self._adopt(held)
        self.left = True

    def _copy_part(self, rank: int, held: dict[str, Tensor], blocks: Sequence[_Block]) -> int:
        """Copy a rank's part, which it may be working on: as it is after a number of blocks, which is returned."""
        part = slice(*self.parts[rank])
        while True:
            before = self._noted(rank)
            for name, tensor in self._held.items():
                held[name][part] = tensor[part]
            done, torn = divmod(before, 2)
            if torn:
                torch._foreach_copy_(blocks[done].tensors, blocks[done].journal)
            if self._noted(rank) == before:
                return done

    def _adopt(self, held: dict[str, Tensor]) -> None:
        self._held = held
        self._state.weights_N = weights_N = held[_PARAM]
        self._state.slots = {slot: held[_SLOT + slot] for slot in self._state.slots}
        for parameter, entry in self._parameters:
            parameter.data = weights_N[entry.start : entry.stop].view(entry.shape)


def _sum(block: _Block) -> Tensor:
    """The summed gradient, in rank order."""
    first, *others = block.grads
    if not others:
        return block.grad.copy_(first)
    torch.add(first, others[0], out=block.grad)
    for other in others[1:]:
        block.grad.add_(other)
    return block.grad
