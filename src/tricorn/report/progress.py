"""What a person sees while a run goes on: a live line in a terminal, sparse lines elsewhere.

All of it goes to standard error: standard output belongs to ``--json``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from tricorn.report.compare import sentence
from tricorn.report.picture import picture
from tricorn.report.table import shown

if TYPE_CHECKING:
    from tricorn.plan import Plan

Now = Callable[[], float]


def progress(stream: TextIO | None = None) -> Progress:
    """The progress that suits the stream, standard error unless another is given."""
    stream = stream or sys.stderr
    return LiveProgress(stream) if stream.isatty() else Progress(stream)


class Progress:
    """Plain lines: one at each epoch, and at most one every ``every`` seconds between. ``now`` tells seconds."""

    def __init__(self, stream: TextIO, *, every: float = 5.0, now: Now = time.monotonic) -> None:
        self._stream = stream
        self._every = every
        self._now = now
        self._total = self._epochs = 0
        self._first: tuple[int, float] | None = None  # the first step seen, and when
        self._told = now()
        self._epoch = 0  # of the last step
        self._figures = ""  # of the last step
        self._untold = False  # whether the last step's epoch still lacks a line

    def started(self, plan: Plan, *, total_steps: int, epochs: int) -> None:
        """The roles are about to start."""
        self._total, self._epochs = total_steps, epochs
        servers = f" and {_plural(plan.servers, 'server')}" if plan.servers else ""
        self._say(f"{plan.strategy} with {_plural(plan.workers, 'worker')}{servers}: {total_steps:,} steps")
        if plan.dense == "mp" and plan.workers > 1:
            self._say(picture(plan))

    def step(self, step: int, *, epoch: int, loss: float, samples_per_second: float) -> None:
        """``step`` updates are committed, the last one in ``epoch`` (from 0), with this mean loss in it so far."""
        now = self._now()
        if epoch != self._epoch:
            self._end_epoch()
        self._first = self._first or (step, now)
        self._epoch, self._untold = epoch, True
        self._figures = f"loss {loss:.4f}"
        if samples_per_second > 0:  # not known by the first word
            self._figures += f"  {_rate(samples_per_second)}"
        eta = remaining(*self._first, step, now, self._total)
        left = "" if eta is None else f"  {duration(eta)} left"
        self._advance(step, now, f"epoch {epoch + 1}/{self._epochs}  {self._figures}{left}")

    def evaluated(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """The epoch (from 0) is over and its evaluation gave these metrics."""
        self._epoch, self._untold = epoch, True
        self._end_epoch(_evaluation(metrics))

    def notice(self, text: str) -> None:
        """Something a person should know: a role was lost, a checkpoint could not be written."""
        self._say(text)

    def finished(self, summary: Mapping[str, Any]) -> None:
        """The run is over; ``summary`` is what ``summary.json`` says."""
        self.close()
        self._end_epoch()
        self._say(
            f"done: {summary['steps']:,} steps, {summary['samples']:,} samples in {duration(summary['seconds'])}"
            f" ({_rate(summary['samples_per_second'])})  loss {shown(summary['loss'])}"
            + _evaluation(summary["metrics"])
        )
        if said := sentence(summary):
            self._say(said)
        self._say(f"run: {summary['run']}")

    def close(self) -> None:
        """Leave the terminal as it was. Safe to call twice."""

    def _end_epoch(self, more: str = "") -> None:
        if self._untold:
            self._untold = False
            self._tell(f"epoch {self._epoch + 1}/{self._epochs} done  {self._figures}{more}")

    def _tell(self, line: str) -> None:
        self._told = self._now()
        self._say(line)

    def _say(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    def _advance(self, step: int, now: float, line: str) -> None:
        if now - self._told >= self._every:
            self._tell(f"step {step:,}/{self._total:,}  {line}")


class LiveProgress(Progress):
    """A line that moves, with a bar, below the lines that stay. Redrawn by the caller's thread, ten times a second."""

    def __init__(self, stream: TextIO, *, every: float = 0.1, now: Now = time.monotonic) -> None:
        super().__init__(stream, every=every, now=now)
        from rich import progress as bars
        from rich.console import Console

        # No thread of its own, and nothing of the caller's output redirected.
        self._bars = bars.Progress(
            bars.BarColumn(bar_width=24),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.description}", markup=False),
            console=Console(file=stream),
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._bars.add_task("starting", total=None)
        self._bars.start()

    def started(self, plan: Plan, *, total_steps: int, epochs: int) -> None:
        super().started(plan, total_steps=total_steps, epochs=epochs)
        self._bars.update(self._task, total=total_steps)

    def close(self) -> None:
        self._bars.stop()

    def _say(self, line: str) -> None:
        self._bars.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _advance(self, step: int, now: float, line: str) -> None:
        self._bars.update(self._task, completed=step, description=line)
        if now - self._told >= self._every or step == self._total:
            self._told = now
            self._bars.refresh()


def remaining(first_step: int, first_time: float, step: int, now: float, total: int) -> float | None:
    """Seconds until ``total`` steps at the pace since the first; None while there is no pace to judge by.

    Everything between steps counts, evaluations and recoveries too; the start of the roles does not.
    """
    if step <= first_step or now <= first_time:
        return None
    return (total - step) * (now - first_time) / (step - first_step)


def duration(seconds: float) -> str:
    """``9.4 s``, ``3 min 20 s`` or ``2 h 5 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _evaluation(metrics: Mapping[str, float]) -> str:
    return "".join(f"  evaluation {name} {shown(float(value))}" for name, value in metrics.items())


def _rate(samples_per_second: float) -> str:
    return f"{samples_per_second:,.{0 if samples_per_second >= 10 else 2}f} samples/s"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
