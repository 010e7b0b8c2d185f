"""How parameters are spread over workers: units of parameters, of each of which every worker owns an even part.

Legend: n elements of all parameters of a unit, end to end; s of them are this worker's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from tricorn.dp.buckets import BUCKET_BYTES, cut
from tricorn.optim import Optimizer
from tricorn.state.flat import flat_pieces, layout, trained_parameters
from tricorn.state.shards import CheckpointReader, Piece

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Unit:
    """Parameters that are gathered, and whose gradients are summed, together.

    ``whole_n`` has the weights while they are here whole; ``own_s``, ``grad_s`` and ``slots`` are this worker's part.
    """

    def __init__(
        self, named: Sequence[tuple[str, nn.Parameter]], optimizer: Optimizer, *, rank: int, workers: int,
        gathered: bool,
    ) -> None:  # fmt: skip
        """``gathered``: the weights are always here whole, and this worker's part is a view of them."""
        self.parameters = [parameter for _, parameter in named]
        self.entries = layout((name, p.shape) for name, p in named)
        self.size = self.entries[-1].stop
        self.bounds = [self.size * part // workers for part in range(workers + 1)]
        self.start, self.stop = self.bounds[rank], self.bounds[rank + 1]
        whole_n = torch.cat([p.detach().flatten() for p in self.parameters])
        self.own_s = whole_n[self.start : self.stop] if gathered else whole_n[self.start : self.stop].clone()
        self.grad_s = torch.zeros_like(self.own_s)
        self.slots = {slot: torch.zeros_like(self.own_s) for slot in optimizer.slots}
        self.whole_n: Tensor | None = None
        self.show(whole_n if gathered else None)

    def show(self, whole_n: Tensor | None) -> None:
        """Let the parameters be views of ``whole_n``; of None, numbers that are none, without memory of their own."""
        self.whole_n = whole_n
        for entry, parameter in zip(self.entries, self.parameters, strict=True):
            if whole_n is None:
                parameter.data = absent(parameter).expand(entry.shape)
            else:
                parameter.data = whole_n[entry.start : entry.stop].view(entry.shape)

    def filled(self) -> Tensor:
        """Room for the whole weights, with this worker's part in place."""
        whole_n = self.own_s.new_empty(self.size)
        whole_n[self.start : self.stop] = self.own_s
        return whole_n

    def flats(self) -> dict[str, Tensor]:
        return {"param": self.own_s} | {f"optim/{slot}": flat_s for slot, flat_s in self.slots.items()}

    def pieces(self) -> list[Piece]:
        """Copies of this worker's part of weights and slots."""
        return flat_pieces(self.flats(), self.entries, self.start, self.stop)

    def load(self, reader: CheckpointReader) -> None:
        """Take this worker's part from a checkpoint."""
        for prefix, flat_s in self.flats().items():
            for entry in self.entries:
                low, high = max(entry.start, self.start), min(entry.stop, self.stop)
                if low < high:
                    flat_s[low - self.start : high - self.start] = reader.read_slice(
                        f"{prefix}/{entry.name}", entry.shape, low - entry.start, high - entry.start
                    )


def absent(like: Tensor) -> Tensor:
    """The number that stands for all weights that are not here: whoever computes with it will notice."""
    key = like.dtype, like.device
    if key not in _absent:
        _absent[key] = torch.full((), float("nan"), dtype=like.dtype, device=like.device)
    return _absent[key]


_absent: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def runs(module: nn.Module) -> list[list[str]]:
    """The names of trained parameters, cut into runs as gradients are into buckets; the last of the module first."""
    named = trained_parameters(module)
    entries = layout((name, p.shape) for name, p in named)
    itemsize = named[0][1].itemsize if named else 1
    return [
        [entries[number].name for number in reversed(bucket.parameters)]
        for bucket in cut(entries, itemsize, BUCKET_BYTES)
    ]


def blocks(module: nn.Module) -> tuple[list[tuple[nn.Module, list[str]]], list[str]]:
    """The module's blocks, with the names of the trained parameters that each has alone; and all other names.

    Blocks are the elements of its lists and sequences, and the layers of PyTorch's that are in none.
    """
    names = {parameter: name for name, parameter in trained_parameters(module)}
    found = list(_blocks(module))
    owners: dict[nn.Parameter, set[int]] = {parameter: set() for parameter in names}
    inside = {inner: number for number, block in enumerate(found) for inner in block.modules()}
    for inner in module.modules():
        for parameter in inner.parameters(recurse=False):
            if parameter in owners:
                owners[parameter].add(inside.get(inner, -1))
    alone: list[list[str]] = [[] for _ in found]
    rest: list[str] = []
    for parameter, name in names.items():
        (first, *others) = owners[parameter]
        (rest if others or first < 0 else alone[first]).append(name)
    return [(block, own) for block, own in zip(found, alone, strict=True) if own], rest


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, _CONTAINERS):
            yield from _blocks(child)
        elif isinstance(module, _CONTAINERS) or type(child).__module__.startswith("torch.nn."):
            yield child
        else:
            yield from _blocks(child)
