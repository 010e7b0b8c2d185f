"""From positions in an epoch's order to batches of tensors, the next of them while this one is computed on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from tricorn.data.order import Permutation, step_range, steps_per_epoch
from tricorn.data.sources import Ids, Source, as_source
from tricorn.errors import note
from tricorn.job import Job
from tricorn.strategy import Batch

EMPTY = Batch(inputs=None, target=None, samples=0, count=0)


SLOW = 1e-3  # seconds: what loads faster gains nothing from a thread of its own
JUDGED = 3  # loads by which it is decided whether a source is loaded ahead
ORDERED = 1 << 12  # positions whose samples are computed at once: as quick as of a batch, whose cost is in the calls


class Slice(NamedTuple):
    """Samples [low, high) of the global batch of a step."""

    step: int
    low: int
    high: int


class Batches:
    """The training and evaluation batches of a job, slice by slice.

    While one slice is computed on, a thread loads the same slice of the next step, if such was asked for before. One
    thread at a time touches the data, and a mistake in it is raised where the slice is asked for. Not loaded ahead
    are data that are there at once, and those that draw from torch's random numbers, of which the model draws too.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._train = as_source(job.train)
        self._evaluate = as_source(job.evaluate) if job.evaluate is not None else None
        self._order = _Order(job.seed, self._train)
        self._steps = steps_per_epoch(len(self._train), job.batch_size) * job.epochs
        self._loads: list[float] = []  # seconds of the first
        self._ahead = False  # until it is judged to be of use
        self._draws = False
        self._last: Slice | None = None
        self._loading: tuple[Slice, _Load] | None = None

    @property
    def evaluation_samples(self) -> int:
        return len(self._evaluate) if self._evaluate is not None else 0

    def samples(self, step: int) -> int:
        """How many samples the global batch of that step has."""
        _, start, stop = step_range(step, len(self._train), self._job.batch_size)
        return stop - start

    def training(self, step: int, low: int, high: int) -> Batch:
        """Samples [low, high) of the global batch of that step."""
        asked = Slice(step, low, high)
        loaded = self._take(asked)
        batch = self._judged(asked) if loaded is None else loaded.result()
        following = Slice(step + 1, low, high)
        expected = self._last is not None and following == Slice(self._last.step + 2, *self._last[1:])
        self._last = asked
        if self._ahead and expected and step + 1 < self._steps and self.samples(step + 1) == self.samples(step):
            self._loading = following, _Load(lambda: self._load(following))
        return batch

    def evaluation(self, low: int, high: int) -> Batch:
        """Samples [low, high) of the evaluation data, in their own order."""
        if self._loading is not None:
            self._loading[1].join()
        return self._batch(self._evaluate, np.arange(low, high))

    def _take(self, asked: Slice) -> _Load | None:
        """What was loaded ahead, if it is what is asked for."""
        if self._loading is None:
            return None
        (given, load), self._loading = self._loading, None
        load.join()
        return load if given == asked else None

    def _judged(self, asked: Slice) -> Batch:
        """Load in this thread; the first times, see whether another could do that as well."""
        if len(self._loads) == JUDGED:
            return self._load(asked)
        before, began = torch.get_rng_state(), time.perf_counter()
        batch = self._load(asked)
        self._loads.append(time.perf_counter() - began)
        self._draws |= not torch.equal(before, torch.get_rng_state())
        if len(self._loads) == JUDGED:
            self._ahead = min(self._loads) > SLOW and not self._draws
        return batch

    def _load(self, asked: Slice) -> Batch:
        epoch, start, _ = step_range(asked.step, len(self._train), self._job.batch_size)
        return self._batch(self._train, self._order.ids(epoch, start + asked.low, start + asked.high))

    def _batch(self, source: Any, ids: Ids) -> Batch:
        if not len(ids):
            return EMPTY
        inputs, target = source.fetch(ids)
        try:
            count = len(ids) if self._job.count is None else int(self._job.count(inputs, target))
        except Exception as error:
            note(error, "count", inputs=inputs, target=target)
            raise
        return Batch(inputs=inputs, target=target, samples=len(ids), count=count)


class _Order:
    """The order of samples, computed a stretch ahead."""

    def __init__(self, seed: int, source: Source) -> None:
        self._seed, self._source = seed, source
        self._epoch, self._start = -1, 0
        self._ids = np.empty(0, np.int64)

    def ids(self, epoch: int, start: int, stop: int) -> Ids:
        """The samples at positions [start, stop) of that epoch."""
        if epoch != self._epoch or not self._start <= start <= stop <= self._start + len(self._ids):
            size = len(self._source)
            order = Permutation(self._seed, epoch, self._source.fingerprint, size)
            self._ids = order.ids(start, max(stop, min(start + ORDERED, size)))
            self._epoch, self._start = epoch, start
        return self._ids[start - self._start : stop - self._start]


class _Load(threading.Thread):
    """A batch that is being loaded; ``result`` after ``join``."""

    def __init__(self, function: Callable[[], Batch]) -> None:
        super().__init__(name="tricorn-load", daemon=True)
        self._function = function
        self._batch: Batch | None = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._batch = self._function()
        except BaseException as error:  # raised again by result(), where the batch is asked for
            self._error = error

    def result(self) -> Batch:
        if self._error is not None:
            raise self._error
        assert self._batch is not None
        return self._batch
