"""What a worker's steps are spent on, in seconds: told to the coordinator, and held against what was predicted."""

from __future__ import annotations

import time

from tricorn.strategy import Trainer

WARM_STEPS = 5  # the first ones of a membership epoch, in which memory is touched and sizes are tried


class Spent:
    """Seconds of this worker's steps, all since the first few of the first membership epoch."""

    def __init__(self) -> None:
        self._skipped = 0
        self._steps = 0
        self._data = self._all = self._computing = 0.0
        self._computed: float | None = None
        self._began = self._loaded = 0.0

    def begin(self) -> None:
        """A step begins with its batch."""
        self._began = time.perf_counter()

    def loaded(self) -> None:
        """The batch is here."""
        self._loaded = time.perf_counter()

    def end(self, trainer: Trainer) -> None:
        """The step is over."""
        computed: float | None = getattr(trainer, "computed", None)  # Timed; isinstance takes 8 us
        if self._skipped < WARM_STEPS:
            self._skipped += 1
        else:
            self._steps += 1
            self._data += self._loaded - self._began
            self._all += time.perf_counter() - self._began
            if computed is not None and self._computed is not None:
                self._computing += computed - self._computed
        self._computed = computed

    def begin_epoch(self) -> None:
        """A new membership epoch: its first steps do not count either."""
        self._skipped = 0

    def values(self) -> dict[str, float]:
        """``steps`` that count, and their seconds: ``all``, ``data`` and, where the trainer tells, ``compute``."""
        told = {"steps": float(self._steps), "all": self._all, "data": self._data}
        return told if self._computed is None else {**told, "compute": self._computing}
