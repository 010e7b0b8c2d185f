"""A part of a parameter of the user's: which part of the whole tensor a worker holds under its name."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Slab(NamedTuple):
    """The index ``ranges`` [start, stop) along ``dim`` of a whole tensor of that ``shape``, one after another."""

    shape: tuple[int, ...]
    dim: int
    ranges: tuple[tuple[int, int], ...]


def mark(tensor: Tensor, slab: Slab) -> None:
    """Let it be known that a parameter or buffer is only that part of the user's."""
    vars(tensor)["tricorn_slab"] = slab


def slab_of(tensor: Tensor) -> Slab | None:
    """Which part a parameter or buffer is, None if it is whole."""
    slab: Slab | None = vars(tensor).get("tricorn_slab")
    return slab
