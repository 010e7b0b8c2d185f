"""How busy others keep this machine: what is measured beside them says as much of them as of what is measured."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from statistics import fmean
from typing import NamedTuple, TypeVar

import psutil

BUSY = 0.15  # share of the cores from which on a measurement is not trusted
PATIENCE = 2.0  # seconds for which measurements are made again
GLANCE = 0.25  # seconds: the kernel counts in hundredths

T = TypeVar("T")


class Moment(NamedTuple):
    """Seconds: of the clock, of the processors for all processes, and for this one and its children that have ended."""

    clock: float
    all: float
    own: float


def moment() -> Moment:
    """Now. Children must have been waited for to be among this process's own."""
    times = psutil.cpu_times()
    used = sum(getattr(times, kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq", "steal"))
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return Moment(time.monotonic(), used, sum(each.ru_utime + each.ru_stime for each in own))


def taken(before: Moment, after: Moment, cores: float, machine: int | None = None) -> float:
    """The share of ``cores`` that others took between two moments, beyond what the ``machine`` had to spare."""
    elapsed = after.clock - before.clock
    if elapsed <= 0:
        return 0.0
    others = ((after.all - before.all) - (after.own - before.own)) / elapsed
    spare = max(0.0, (machine or os.cpu_count() or 1) - cores)
    return min(1.0, max(0.0, others - spare) / cores)


def glance(cores: float) -> float:
    """The share of the cores that others take now."""
    before = moment()
    time.sleep(GLANCE)
    return taken(before, moment(), cores)


class Quiet:
    """Measures while others leave the machine alone, or as nearly as can be had in so many seconds of ``patience``."""

    def __init__(self, cores: float, patience: float = PATIENCE) -> None:
        self._cores = cores
        self._patience = patience
        self._shares: list[float] = []

    @property
    def busy(self) -> float:
        """The share of the cores that others took while what counts was measured, on average."""
        return fmean(self._shares) if self._shares else 0.0

    def measure(self, work: Callable[[], T]) -> T:
        """What it returns; of several times, until one is quiet or patience ends, the time when others took least."""
        found: list[tuple[float, T]] = []
        while not found or (found[-1][0] > BUSY and self._patience > 0):
            before = moment()
            value = work()
            after = moment()
            if found:
                self._patience -= after.clock - before.clock
            found.append((taken(before, after, self._cores), value))
        share, value = min(found, key=lambda each: each[0])
        self._shares.append(share)
        return value
