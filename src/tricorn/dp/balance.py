"""How large each worker's share of a batch is: in proportion to how fast it was seen to compute. Pure.

All workers are told the same times and compute the same shares from them. Decisions are in whole numbers, so that no
rounding can tell them apart.

Legend: W workers, n_w samples of worker w, t_w seconds that it computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

WINDOW_STEPS = 16  # the fewest steps that a decision is drawn from
WINDOW_SECONDS = 0.5  # several periods of a scheduler that gives a process a part of each 0.1 s
GAIN = 0.05  # the part of a step's time that a change must promise to save: what is less is noise
DAMPING = 0.7  # the part of the way to the ideal, in logarithms: what a step costs beside its samples bends the line
PARTS = 1 << 16


def cut(weights: Sequence[int], samples: int) -> list[int]:
    """Cut a batch by weights: W + 1 bounds. Everybody gets a sample, the rest goes by weight.

    With equal weights, or fewer samples than workers, shares are equal to within one.
    """
    workers = len(weights)
    if samples < workers:
        return [samples * rank // workers for rank in range(workers + 1)]
    bounds, total, below = [0], sum(weights), 0
    for rank, weight in enumerate(weights, 1):
        below += weight
        bounds.append(rank + (samples - workers) * below // total)
    return bounds


def share_sizes(weights: Sequence[int], samples: int) -> list[int]:
    """How many samples each worker has."""
    return [stop - start for start, stop in pairwise(cut(weights, samples))]


class Balance:
    """``weights`` are for ``cut``; equal at first. ``observe`` draws conclusions from each step."""

    def __init__(self, workers: int) -> None:
        self.weights = [PARTS] * workers
        self._steps = 0
        self._samples = [0] * workers
        self._seconds = [0.0] * workers
        self._longest = 0.0  # seconds of the slowest worker of each step: what all wait for
        # The weights before the last change, and the seconds that a step has to take with it.
        self._before: tuple[list[int], float] | None = None
        self._rest = 0  # windows for which nothing is changed, because the last change was none for the better
        self._rests = 1

    def observe(self, samples: Sequence[int], seconds: Sequence[float]) -> bool:
        """Take note of n_w and t_w of a step; whether the weights have changed with it."""
        self._steps += 1
        self._samples = [sum(pair) for pair in zip(self._samples, samples, strict=True)]
        self._seconds = [sum(pair) for pair in zip(self._seconds, seconds, strict=True)]
        self._longest += max(seconds)
        if self._steps < WINDOW_STEPS or max(self._seconds) < WINDOW_SECONDS:
            return False
        known = all(n > 0 and t > 0 for n, t in zip(self._samples, self._seconds, strict=True))
        changed = known and (self._regret() or self._decide())
        self._steps, self._samples, self._seconds = 0, [0] * len(self.weights), [0.0] * len(self.weights)
        self._longest = 0.0
        return changed

    def _regret(self) -> bool:
        """Take back a change that has not gained what it had to: one that stalls gains nothing by having less to do."""
        if self._before is None or self._longest / self._steps <= self._before[1]:
            self._before = None
            return False
        self.weights, self._before = self._before[0], None
        self._rest, self._rests = self._rests, 2 * self._rests
        return True

    def _decide(self) -> bool:
        """Move n_w towards n_w / t_w, under which all would take equally long; False where that gains too little."""
        batch, now = sum(self._samples), max(self._seconds)
        if self._rest:
            self._rest -= 1
            return False
        speeds = [n / t for n, t in zip(self._samples, self._seconds, strict=True)]
        if 1 - batch / sum(speeds) / now < GAIN:
            return False
        wanted = [
            n ** (1 - DAMPING) * (batch * speed / sum(speeds)) ** DAMPING
            for n, speed in zip(self._samples, speeds, strict=True)
        ]
        # In samples of one step; the one that everybody has is not the weights' to give.
        scale = batch / self._steps / sum(wanted)
        above = [max(0.0, n * scale - 1) for n in wanted]
        if not sum(above):
            return False
        weights = [round(PARTS * len(above) * n / sum(above)) for n in above]
        if weights == self.weights:
            return False
        self._before = self.weights, self._longest / self._steps * (1 - GAIN / 2)
        self.weights = weights
        return True
