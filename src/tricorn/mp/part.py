"""What a worker of a mesh holds of the state, and how its gradient becomes that of the global batch.

Legend: N elements of all trainable parameters that are here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from tricorn.comm.group import Group
from tricorn.mp.mesh import Mesh
from tricorn.mp.partition import Stage
from tricorn.optim import Optimizer
from tricorn.state.flat import Entry, FlatState, buffer_pieces, flat_pieces
from tricorn.state.gradient import squared_norm
from tricorn.state.shards import Piece
from tricorn.state.slabs import slab_of


class Chunks(nn.Module):
    """A worker's stages as one module, whose parameters and buffers keep the names that the user's model gives them.

    What is whole comes before what is split, so that it lies at the same place on all shards: optimizers' kernels
    round by where in memory a weight lies, and what is whole must stay equal.
    """

    def __init__(self, stages: Sequence[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        named = {name: parameter for stage in self.stages for name, parameter in stage.named_parameters()}
        yield from sorted(named.items(), key=lambda each: slab_of(each[1]) is not None)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        yield from {name: buffer for stage in self.stages for name, buffer in stage.named_buffers()}.items()


class Part(FlatState):
    """The state of one place in the mesh.

    ``tied`` names the parameters that several workers in line have, with the stages of these workers, this one's
    among them. Replicas hold the same; with ``mesh.spread`` each of them updates its ``own`` part of the weights.
    """

    def __init__(
        self, stages: Sequence[Stage], optimizer: Optimizer, device: torch.device, mesh: Mesh, rank: int,
        tied: Mapping[str, tuple[int, ...]],
    ) -> None:  # fmt: skip
        self.place = mesh.place(rank)
        self.stages = stages
        super().__init__(
            Chunks(stages), optimizer, device, share=(self.place.replica, mesh.replicas) if mesh.spread else (0, 1)
        )
        self.spread = mesh.spread
        self.tied = tied
        size, index, parts = len(self.weights_N), self.place.replica, mesh.replicas
        # What is equal on several workers is told, and written, by one of them. Replicas share that out.
        self._told = slice(size * index // parts, size * (index + 1) // parts)
        self._tells = tuple(entry for entry in self.entries if self._tells_of(entry))

    def _tells_of(self, entry: Entry) -> bool:
        first = min(self.tied.get(entry.name, (self.place.stage,)))
        return self.place.stage == first and (entry.slab is not None or self.place.shard == 0)

    def sum_tied(self, line: Group) -> None:
        """Add up the gradients of tied parameters over the stages that have them, in their order on each."""
        own = {name: self._gradient(name) for name in sorted(self.tied)}
        sending = [
            line.send(gradient, stage)
            for name, gradient in own.items()
            for stage in self.tied[name]
            if stage != line.rank
        ]
        parts: dict[str, list[Tensor]] = {}
        for name, gradient in own.items():
            for stage in self.tied[name]:
                part = gradient if stage == line.rank else torch.empty_like(gradient)
                if part is not gradient:
                    line.receive(part, stage)
                parts.setdefault(name, []).append(part)
        for handle in sending:
            handle.wait()
        for name, gradient in own.items():
            first, *others = parts[name]
            total = first.clone()
            for part in others:
                total += part
            gradient.copy_(total)

    def _gradient(self, name: str) -> Tensor:
        entry = next(entry for entry in self.entries if entry.name == name)
        return self.grads_N[entry.start : entry.stop]

    def sum_copies(self, copies: Group) -> None:
        """Sum the gradient over the replicas, where each needs it."""
        if self.spread:
            copies.reduce_scatter(self.grads_N, self.bounds).wait()
        else:
            copies.all_reduce_now(self.grads_N)

    def told_square(self) -> float:
        """This worker's addend to the squared norm of the summed gradient of the whole model."""
        return sum(
            squared_norm(self.grads_N[low:high])
            for entry in self._tells
            if (low := max(entry.start, self._told.start)) < (high := min(entry.stop, self._told.stop))
        )

    def gather(self, copies: Group) -> None:
        """Have the weights here that other replicas update."""
        if self.spread:
            copies.all_gather(self.weights_N, self.bounds).wait()

    def copy(self, copies: Group, source: int, step: int, beside: Sequence[Tensor]) -> None:
        """Take the state of ``step``, and what is beside it, from a replica that has it; those that have it too take
        part.
        """
        for tensor in (*self.tensors().values(), *self.module.buffers(), *beside):
            sent = tensor.contiguous()
            copies.broadcast(sent, source)
            tensor.copy_(sent)
        self.grads_N.zero_()
        self.step = step

    def pieces(self) -> list[Piece]:
        """Copies of what this worker writes to a checkpoint."""
        low, high = self._told.start - self.own.start, self._told.stop - self.own.start
        flats = {prefix: flat[low:high] for prefix, flat in self.tensors().items()}
        pieces = flat_pieces(flats, self._tells, self._told.start, self._told.stop)
        if self.place.replica > 0:
            return pieces
        buffers = buffer_pieces(self.module)
        whole = {name for name, buffer in self.module.named_buffers() if slab_of(buffer) is None}
        return pieces + [p for p in buffers if self.place.shard == 0 or p.key.removeprefix("buffer/") not in whole]
