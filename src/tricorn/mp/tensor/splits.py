"""What is split how: the result of looking at a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from tricorn.mp.tensor.cut import Block, Blocks, settled


class Part(NamedTuple):
    """A parameter is divided along ``dim``, in blocks of (length, units); what it makes is gathered if ``gathers``."""

    dim: int
    blocks: tuple[tuple[int, int], ...]
    gathers: bool = False

    def among(self, shards: int) -> Blocks:
        return tuple(Block(length, settled(units, shards)) for length, units in self.blocks)


@dataclass(frozen=True, kw_only=True)
class Splits:
    """``of`` the parameters that are split, by name; ``whole``, why other layers' weights are not.

    ``sums`` and ``gathers``: bytes of each value that shards exchange in a step with the samples that were looked at.
    """

    model: str
    shards: int
    of: Mapping[str, Part] = field(default_factory=dict)
    whole: Mapping[str, str] = field(default_factory=dict)
    sums: tuple[int, ...] = ()
    gathers: tuple[int, ...] = ()

    def refusal(self) -> str | None:
        """Why the model cannot be split among so many shards, and what would have to change; None if it can."""
        if self.of:
            return None
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(self.whole.items())[:4])
        found = f" ({reasons})" if reasons else ""
        return (
            f"{self.model} has no layers to split among {self.shards} workers{found}; tensor parallel splits pairs of "
            "linear layers or convolutions with only elementwise operations between them, attention by heads, and "
            "large embeddings and last layers; use replicas or stages instead of tensor"
        )
