"""What the shards of a layer exchange.

A value that is whole is the same on all shards, and so is its gradient. A value that is split is a part on each shard,
and its gradient too. Each way from one to the other has its exchange, forward or backward (Megatron-LM, arXiv
1909.08053, section 3).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tricorn.mp.tensor.cut import Blocks, length_of, ranges_of

if TYPE_CHECKING:
    from tricorn.comm.group import Group


class Team:
    """This shard among the others. Every method but ``narrow`` is called by all shards in the same order.

    ``waited``: seconds spent on exchanging.
    """

    shard: int | None

    def __init__(self, group: Group) -> None:
        self.shard = group.rank
        self.shards = group.size
        self._group = group
        self.gathered_outputs: frozenset[str] = frozenset()
        self.waited = 0.0

    def ranges(self, blocks: Blocks) -> tuple[tuple[int, int], ...]:
        """The indices [start, stop) of this shard's part of a dimension."""
        return ((0, length_of(blocks)),) if self.shard is None else ranges_of(blocks, self.shard)

    def local_length(self, blocks: Blocks) -> int:
        """Of this shard's part of a dimension."""
        return sum(stop - start for start, stop in self.ranges(blocks))

    def narrow(self, tensor: Tensor, dim: int, blocks: Blocks) -> Tensor:
        """This shard's part of a tensor that is whole and needs no gradient. May be a view."""
        return tensor if self.shard is None else _part(tensor, dim, ranges_of(blocks, self.shard))

    def shared(self, whole: Tensor) -> Tensor:
        """A whole value as an operand of split ones: its gradient is the sum over the shards."""
        if not whole.requires_grad or not torch.is_grad_enabled():
            return whole
        if whole.is_leaf:
            return self._sharing(whole)
        known: tuple[int, Tensor] = vars(whole).get("tricorn_shared", (-1, whole))
        if known[0] != whole._version:
            # Kept, so that the gradients of all its uses are added up before they are summed over the shards.
            known = vars(whole)["tricorn_shared"] = whole._version, self._sharing(whole)
        return known[1]

    def sum(self, partial: Tensor) -> Tensor:
        """The sum over the shards, in place of a value that nobody else has yet and that is not kept for backward.

        Its gradient is that of each part.
        """
        if not partial.is_contiguous():
            partial = partial.contiguous()
        self._all_reduce(partial)
        return partial

    def gather(self, part: Tensor, dim: int, blocks: Blocks) -> Tensor:
        """The whole of a split value; its gradient is this shard's part of it."""
        return _gather(part, self, dim, blocks)

    def slice(self, whole: Tensor, dim: int, blocks: Blocks) -> Tensor:
        """This shard's part of a whole value; its gradient is gathered."""
        if not whole.requires_grad or not torch.is_grad_enabled():
            return self.narrow(whole, dim, blocks)
        return _slice(whole, self, dim, blocks)

    def gathered(self, part: Tensor, dim: int, blocks: Blocks) -> Tensor:
        """As ``gather``, outside of autograd."""
        ranges = [ranges_of(blocks, shard) for shard in range(self.shards)]
        ordered = part.movedim(dim, 0).contiguous()
        row = ordered[0].numel() if len(ordered) else part.numel()
        flat = part.new_empty(length_of(blocks) * row)
        edges = [0]
        for own in ranges:
            edges.append(edges[-1] + sum(stop - start for start, stop in own) * row)
        assert self.shard is not None
        flat[edges[self.shard] : edges[self.shard + 1]] = ordered.flatten()
        began = time.perf_counter()
        self._group.all_gather(flat, edges).wait()
        self.waited += time.perf_counter() - began
        rows, starts = flat.view(length_of(blocks), *ordered.shape[1:]), []
        for own, start in zip(ranges, edges, strict=False):
            at = start // max(row, 1)
            for low, high in own:
                starts.append((low, rows[at : at + high - low]))
                at += high - low
        whole = torch.cat([piece for _, piece in sorted(starts, key=lambda item: item[0])])
        return whole.movedim(0, dim).contiguous()

    def gathers(self, origins: frozenset[str]) -> bool:
        """Whether what is made with these parameters is to be gathered at once."""
        return not self.gathered_outputs.isdisjoint(origins)

    def stopped(self, origins: frozenset[str], why: str, *, sliced: bool = False) -> None:
        """Hear that a split value had to be made whole, or (``sliced``) a whole one split to go with it."""

    def regroup(self, origins: frozenset[str], blocks: Blocks, sizes: Sequence[int]) -> bool:
        """Hear that a dimension is viewed as several; whether it has to be whole for it, for now."""
        return False

    def rearrange(self, origins: frozenset[str], blocks: Blocks, lengths: Sequence[int]) -> None:
        """Hear that a dimension is taken apart in other lengths than those of its blocks."""

    def _all_reduce(self, tensor: Tensor) -> None:
        began = time.perf_counter()
        self._group.all_reduce_now(tensor)
        self.waited += time.perf_counter() - began

    def _sharing(self, whole: Tensor) -> Tensor:
        # A view in all but name: a true one would keep ``whole`` alive, which keeps it.
        shared: Tensor = torch.ops.aten._unsafe_view(whole, whole.shape)
        register: Callable[..., Any] = shared.register_hook
        register(self._summed)
        return shared

    def _summed(self, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)  # what comes in may be another's too
        self._all_reduce(total)
        return total


def _part(tensor: Tensor, dim: int, ranges: tuple[tuple[int, int], ...]) -> Tensor:
    parts = [tensor.narrow(dim, start, stop - start) for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, team: Team, dim: int, blocks: Blocks) -> Tensor:
        ctx.team, ctx.dim, ctx.blocks = team, dim, blocks
        return team.gathered(part, dim, blocks)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.team.narrow(gradient, ctx.dim, ctx.blocks), None, None, None


_gather: Callable[..., Tensor] = _Gather.apply


class _Slice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, team: Team, dim: int, blocks: Blocks) -> Tensor:
        ctx.team, ctx.dim, ctx.blocks = team, dim, blocks
        return team.narrow(whole, dim, blocks).clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.team.gathered(gradient, ctx.dim, ctx.blocks), None, None, None


_slice: Callable[..., Tensor] = _Slice.apply
