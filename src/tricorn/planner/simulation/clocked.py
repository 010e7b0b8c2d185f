"""Asynchronous updates on a virtual clock: each worker at its own pace, held back by clocks where they are bound.

Legend: m workers.
"""

from __future__ import annotations

import heapq
from collections import Counter
from itertools import count, cycle

import numpy as np

from tricorn.plan import Plan
from tricorn.planner.parts import Parts
from tricorn.planner.prediction import EXCHANGE, UPDATE
from tricorn.planner.simulation.noise import Noise
from tricorn.planner.simulation.trace import Trace
from tricorn.ps.consistency import Clocks, histogram, row_bound

WARM = 0.2  # of the updates, until the workers are out of step with each other


class _Line:
    """Something that serves one after another."""

    def __init__(self) -> None:
        self._free = self.busy = 0.0

    def take(self, now: float, seconds: float) -> float:
        """Have it for so long; returns when it began."""
        began = max(now, self._free)
        self._free = began + seconds
        self.busy += seconds
        return began


class _Run:
    """Workers compute, push to the fullest server over its link, and read its weights over the same."""

    def __init__(self, plan: Plan, parts: Parts, noise: Noise, steps: int) -> None:
        assert parts.served is not None
        self._parts, self._served, self._steps = parts, parts.served, steps
        self._m = plan.workers
        self._bound = row_bound(plan.consistency, plan.staleness)
        self._answering = parts.after[EXCHANGE] + parts.after[UPDATE]
        self._clocks = Clocks()
        self._up, self._down, self._processor = _Line(), _Line(), _Line()
        self._events: list[tuple[float, int, int, bool]] = []  # when, in which order, whose; whether it is applied
        self._order = count()
        self._held: list[tuple[int, int, float]] = []  # clock, worker, since when it waits to read
        self._version = 0
        self._read = [0] * self._m  # the version that each computes from
        self._computing = [cycle(seconds) for seconds in (noise.factors(steps) * parts.computing).T.tolist()]
        self._applied: list[float] = []
        self._ages: Counter[int] = Counter()
        self._queueing = [0.0] * self._m  # how long each one's last gradient waits for the processor
        self._waited = 0.0

    def trace(self) -> Trace:
        for worker in range(self._m):
            self._clocks.wake(worker)
        for worker in range(self._m):
            self._ask(worker, 0.0)
        now = 0.0
        while len(self._applied) < self._steps * self._m:
            now, _, worker, applied = heapq.heappop(self._events)
            if applied:
                self._apply(worker, now)
            else:
                self._push(worker, now)
        seconds = self._paces()
        waiting = {"worker": self._waited / (now * self._m), "server": max(0.0, 1 - self._processor.busy / now)}
        return Trace(seconds, waiting, histogram(self._ages))

    def _ask(self, worker: int, now: float) -> None:
        """The worker wants weights: they are read, or it waits for the slowest."""
        if self._clocks.may_read(worker, self._bound):
            self._compute(worker, now)
        else:
            heapq.heappush(self._held, (self._clocks.clocks[worker], worker, now))

    def _compute(self, worker: int, now: float) -> None:
        self._read[worker] = self._version
        ready = self._passed(self._down, worker, now) + self._parts.loading
        self._later(ready + next(self._computing[worker]), worker, applied=False)

    def _push(self, worker: int, now: float) -> None:
        arrived = self._passed(self._up, worker, now)
        began = self._processor.take(arrived, self._served.busy)
        self._queueing[worker] = began - arrived
        self._later(began + self._answering, worker, applied=True)

    def _apply(self, worker: int, now: float) -> None:
        self._ages[self._version - self._read[worker]] += 1
        self._version += 1
        self._waited += self._queueing[worker]
        self._applied.append(now)
        self._clocks.push(worker)
        self._ask(worker, now)
        # The slowest that waits goes first: if it may not read, nobody may.
        while self._held and self._clocks.may_read(self._held[0][1], self._bound):
            _, released, since = heapq.heappop(self._held)
            self._waited += now - since
            self._compute(released, now)

    def _passed(self, link: _Line, worker: int, now: float) -> float:
        """When a message has come through; the first workers are on the server's own host."""
        served = self._served
        if not served.remote and not served.own:
            return now
        ended = now + served.own
        if worker >= self._m - served.remote:
            ended = max(ended, link.take(now, served.link) + served.link)
        return ended + served.latency

    def _later(self, when: float, worker: int, *, applied: bool) -> None:
        heapq.heappush(self._events, (when, next(self._order), worker, applied))

    def _paces(self) -> list[float]:
        """Seconds of an update, on average of each m that follow one another, once the workers are under way."""
        times = np.array(self._applied)[int(WARM * len(self._applied)) - 1 :: self._m]
        return [float(seconds) for seconds in np.diff(times) / self._m]


def run(plan: Plan, parts: Parts, noise: Noise, steps: int) -> Trace:
    """So many updates of each worker, at least 4, on average: who is fast makes more."""
    return _Run(plan, parts, noise, steps).trace()
