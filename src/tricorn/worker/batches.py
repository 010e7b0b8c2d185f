"""From positions in an epoch's order to batches of tensors."""

from __future__ import annotations

from typing import Any

import numpy as np

from tricorn.data.order import Permutation, step_range
from tricorn.data.sources import Ids, as_source
from tricorn.job import Job
from tricorn.strategy import Batch

EMPTY = Batch(inputs=None, target=None, samples=0, count=0)


class Batches:
    """The training and evaluation batches of a job, slice by slice."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._train = as_source(job.train)
        self._evaluate = as_source(job.evaluate) if job.evaluate is not None else None
        self._permutation: tuple[int, Permutation] | None = None

    @property
    def evaluation_samples(self) -> int:
        return len(self._evaluate) if self._evaluate is not None else 0

    def samples(self, step: int) -> int:
        """How many samples the global batch of that step has."""
        _, start, stop = step_range(step, len(self._train), self._job.batch_size)
        return stop - start

    def training(self, step: int, low: int, high: int) -> Batch:
        """Samples [low, high) of the global batch of that step."""
        epoch, start, _ = step_range(step, len(self._train), self._job.batch_size)
        if self._permutation is None or self._permutation[0] != epoch:
            size = len(self._train)
            self._permutation = epoch, Permutation(self._job.seed, epoch, self._train.fingerprint, size)
        return self._batch(self._train, self._permutation[1].ids(start + low, start + high))

    def evaluation(self, low: int, high: int) -> Batch:
        """Samples [low, high) of the evaluation data, in their own order."""
        return self._batch(self._evaluate, np.arange(low, high))

    def _batch(self, source: Any, ids: Ids) -> Batch:
        if not len(ids):
            return EMPTY
        inputs, target = source.fetch(ids)
        count = len(ids) if self._job.count is None else int(self._job.count(inputs, target))
        return Batch(inputs=inputs, target=target, samples=len(ids), count=count)
