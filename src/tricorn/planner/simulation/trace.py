"""What a simulation has seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Trace(NamedTuple):
    """``seconds``: samples of what one update of the model took. The rest as ``Simulation`` has it."""

    seconds: Sequence[float]
    waiting: dict[str, float]
    staleness: dict[str, float]
