"""Which steps have been evaluated, and the shares of workers of which the others are made up."""

from __future__ import annotations

from itertools import pairwise

from tricorn.control import messages as m
from tricorn.control.facts import Facts


class Evaluations:
    """The end of each epoch is judged by all workers, each a share; ``done`` are the steps that were judged whole."""

    def __init__(self, facts: Facts, done: set[int]) -> None:
        self.done = done
        self._facts = facts
        self._shares: dict[int, dict[str, m.Evaluated]] = {}  # by step and role

    def due(self, step: int) -> bool:
        """Whether the model of this step is still to be judged."""
        at_boundary = step > 0 and step % self._facts.steps_per_epoch == 0
        return bool(self._facts.evaluation_samples) and at_boundary and step not in self.done

    def add(self, role: str, share: m.Evaluated) -> dict[str, float] | None:
        """Take a share, which may be told more than once; returns the means when it was the last one missing."""
        if share.step in self.done:
            return None
        shares = self._shares.setdefault(share.step, {})
        shares[role] = share
        if sum(s.samples for s in shares.values()) != self._facts.evaluation_samples:
            return None
        del self._shares[share.step]
        self.done.add(share.step)
        return _means([shares[name] for name in sorted(shares)])

    def shares(self, workers: int) -> list[tuple[int, int]]:
        """The samples [start, stop) that each of so many workers judges."""
        edges = [self._facts.evaluation_samples * i // workers for i in range(workers + 1)]
        return list(pairwise(edges))

    def go_back(self, step: int) -> None:
        """Later steps are undone, and what was measured of them."""
        self.done = {done for done in self.done if done <= step}
        self._shares = {later: shares for later, shares in self._shares.items() if later <= step}


def _means(shares: list[m.Evaluated]) -> dict[str, float]:
    """Sums over sums of weights."""
    totals: dict[str, tuple[float, float]] = {}
    for share in shares:
        for name, (value, weight) in share.sums.items():
            value_sum, weight_sum = totals.get(name, (0.0, 0.0))
            totals[name] = (value_sum + value, weight_sum + weight)
    return {name: value / weight for name, (value, weight) in totals.items() if weight}
