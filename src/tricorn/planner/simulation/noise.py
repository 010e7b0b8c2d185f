"""How much longer or shorter than measured things take: drawn by a seed.

Legend: K steps, m workers.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from tricorn.plan import Plan
from tricorn.planner.ground import Ground
from tricorn.planner.parts import deviation, stalls_of

Floats = NDArray[np.float64]

FASTEST = 0.5  # of what was measured; nothing takes less
AT_ONCE = 1 << 20  # numbers that are drawn at a time


class Noise:
    """Of each worker: a scatter as the calibration found it, and the stalls that the cluster file states.

    What of the scatter is doubt is drawn once, for all workers and steps.
    """

    def __init__(self, plan: Plan, ground: Ground, scatter: float, seed: int, *, calm: bool) -> None:
        self._draw = np.random.default_rng(seed)
        jitter = ground.jitter(scatter)
        self._deviation = deviation(jitter)
        doubt = deviation(scatter - jitter)
        self._level = max(FASTEST, 1 + doubt * self._draw.standard_normal()) if doubt else 1.0
        self._workers = plan.workers
        stalls = np.array(stalls_of(plan, ground))
        self._share, self._times = stalls[:, 0] * (not calm), stalls[:, 1]
        self._stalling = bool(self._share.any())

    def factors(self, steps: int) -> Floats:
        """What computing takes beside what was measured, [K, m]."""
        shape = steps, self._workers
        found = np.full(shape, self._level)
        if self._deviation:
            found += self._deviation * self._draw.standard_normal(shape)
            np.maximum(found, FASTEST, out=found)
        if self._stalling:
            found *= np.where(self._draw.random(shape) < self._share, self._times, 1.0)
        return found

    def blocks(self, steps: int, of: int = 1) -> Iterator[Floats]:
        """The same of all steps, a few at a time, in multiples of ``of``."""
        each = max(1, AT_ONCE // self._workers // of) * of
        for start in range(0, steps, each):
            yield self.factors(min(each, steps - start))
