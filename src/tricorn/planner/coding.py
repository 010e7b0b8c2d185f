"""What it takes to send gradients encoded: a process that sends to itself what it would send to one other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from tricorn.dp.compress import compressor, warm
from tricorn.plan import Compression
from tricorn.planner.computing import rounds
from tricorn.planner.figures import Point
from tricorn.state.flat import Entry

SIDES = (16, 128, 512)  # of square matrices


def coding() -> Iterator[tuple[str, list[Point]]]:
    """Of each way to compress, the seconds of one process for a sum of so many bytes among two."""
    for how in get_args(Compression):
        if how != "none":
            warm(how, torch.float32)
            yield how, [_point(how, side) for side in SIDES]


def _point(how: Compression, side: int) -> Point:
    entry = Entry(name="", shape=(side, side), start=0, stop=side * side)
    flat_N = torch.randn(side * side, generator=torch.Generator().manual_seed(0))
    work = partial(compressor(how, [entry], flat_N.dtype).sum, _Alone(), flat_N.clone(), 0, 1)
    return Point(flat_N.nbytes, *rounds(work))


class _Alone:
    """A Wire (dp/wire.py) of two ranks, where the other has the same to send: passes are made, numbers stay small."""

    rank, size = 0, 2

    def all_reduce(self, flat: Tensor) -> None:
        flat.mul_(1.0)

    def all_to_all(self, sends: Sequence[Tensor], receives: Sequence[Tensor]) -> None:
        for data in receives:
            data.copy_(sends[0])

    def all_gather(self, flat: Tensor, bounds: Sequence[int]) -> None:
        flat[bounds[1] : bounds[2]] = flat[: bounds[1]]
