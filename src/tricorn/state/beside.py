"""What stands in for ``Beside`` where every worker trains the tables itself."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tricorn.state.rows import begin_rows

if TYPE_CHECKING:
    from tricorn.job import Job
    from tricorn.state.shards import Piece
    from tricorn.strategy import Seat


class WholeTables:
    """Fulfils ``tricorn.strategy.Beside``: tables stay in the model, as parameters like all others."""

    alone = foresees = reads = False
    bytes_sent = 0

    def __init__(self, job: Job) -> None:
        self._job = job
        self._nothing = torch.empty(0, dtype=torch.float64)

    def attach(self, model: nn.Module) -> None:
        begin_rows(self._job, model)

    def join(self, seat: Seat, ranks: Sequence[int], module: nn.Module) -> None:
        """There is nobody to meet."""

    def carried(self) -> Tensor:
        return self._nothing

    def foresee(self, step: int, parts: Sequence[Any]) -> None:
        """Nothing has to be read in advance."""

    def fetch(self, step: int, parts: Sequence[Any]) -> None:
        """All rows are here."""

    def hand_over(self, count: int) -> float:
        return 0.0

    def commit(self, count: int, scale: float, factor: float) -> None:
        """The trainer updates the tables with the rest."""

    def abandon(self) -> None:
        """The trainer has the gradients."""

    def judging(self, parts: Sequence[Any]) -> AbstractContextManager[None]:
        return nullcontext()

    def pieces(self) -> Sequence[Piece]:
        return []

    def interrupt(self) -> None:
        """Nothing blocks."""

    def close(self) -> None:
        """Nothing is open."""
