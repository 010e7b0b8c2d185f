"""Judging the model: sums over this worker's share, which the coordinator adds up and divides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tricorn.errors import JobFailed, note
from tricorn.job import Job
from tricorn.state.gradient import device_of_output, loss_sum, placed
from tricorn.strategy import Batch, Trainer
from tricorn.worker.batches import Batches


class Judge:
    """Adds up loss and metrics: ``sums`` is name -> (sum, weight); ``samples`` counts what was judged."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.samples = 0
        self.sums: dict[str, tuple[float, float]] = {}

    def __call__(self, output: Any, batch: Batch) -> None:
        target = placed(self._job, batch.target, device_of_output(output))
        if batch.count:
            self._add("loss", loss_sum(self._job, output, batch).item(), batch.count)
        for name, metric in self._job.metrics.items():
            try:
                value = metric(output, target)
            except Exception as error:
                note(error, f"metrics[{name!r}]", output=output, target=target, inputs=batch.inputs)
                raise
            self._add(name, _number(name, value) * batch.samples, batch.samples)
        self.samples += batch.samples

    def _add(self, name: str, value: float, weight: float) -> None:
        value_sum, weight_sum = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (value_sum + value, weight_sum + weight)


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
        raise JobFailed(
            f"metrics[{name!r}] gives a {type(value).__name__}{shape} instead of one number",
            remedy="Return the mean over the samples given, as with `.float().mean()`.",
        ) from None


def evaluate(job: Job, trainer: Trainer, batches: Batches, start: int, stop: int, go_on: Callable[[], None]) -> Judge:
    """Judge evaluation samples [start, stop), a batch at a time; ``go_on`` is called before each and may raise."""
    judge = Judge(job)
    for low in range(start, stop, job.batch_size):
        go_on()
        samples = min(job.batch_size, stop - low)
        share_start, share_stop = trainer.share(samples)
        trainer.evaluate(batches.evaluation(low + share_start, low + share_stop), samples, judge)
    return judge
