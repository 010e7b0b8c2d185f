"""The loop of a synchronous run: every worker runs every step, and all agree on each, or on each round of several."""

from __future__ import annotations

import time

from tricorn.control import messages as m
from tricorn.errors import ClusterError
from tricorn.strategy import Outcome
from tricorn.worker.loop import Loop

REPORT_SECONDS = 0.05
TELL_SECONDS = 0.5  # from one word of what steps were spent on to the next
REPORTED_LOSSES = 10_000  # of the newest steps; more in one report would not fit its frame


class SynchronousLoop(Loop):
    """Steps follow one another without a word from the coordinator; the lead (rank 0) reports them in bundles.

    Only at a step that all agree on anything is reported, saved, judged or stopped: what lies between two of them
    is not yet part of the run.
    """

    def members_run(self, begin: m.Begin) -> None:
        epoch = begin.epoch
        if begin.evaluate:
            self.evaluate(epoch, begin.step, 0, self.batches.evaluation_samples)
        step, saved, stopped = begin.step, begin.saved, False
        losses: list[float] = []
        reported = 0.0  # the first step is told at once
        told = time.monotonic()
        while step < self.total_steps and not stopped:
            self.go_on(epoch)
            before = step
            step, outcome = self._round(epoch, step)
            losses += [outcome.loss_sum / outcome.count if outcome.count else 0.0] * (step - before)
            last = step == self.total_steps
            boundary = step % self.steps_per_epoch == 0
            stopped = outcome.wishes.stop > 0
            if self.rank == 0 and (boundary or stopped or last or time.monotonic() - reported > REPORT_SECONDS):
                self.link.send(m.Committed(epoch=epoch, upto=step, losses=losses[-REPORTED_LOSSES:]))
                losses, reported = [], time.monotonic()
            cadence = self.checkpoint_steps and step // self.checkpoint_steps > before // self.checkpoint_steps
            if outcome.wishes.checkpoint or cadence or ((stopped or last) and saved != step):
                self._save(epoch, step)
                saved = step
            if time.monotonic() - told > TELL_SECONDS:
                self.tell_spent(epoch, step)
                told = time.monotonic()
            if boundary and self.batches.evaluation_samples:
                self.evaluate(epoch, step, 0, self.batches.evaluation_samples)
        if saved != step:
            self._save(epoch, step)
        self.saver.wait()
        self.tell_spent(epoch, step)
        self.link.send(m.Finished(epoch=epoch, stopped=stopped, bytes_sent=self.trainer.bytes_sent))

    def _save(self, epoch: int, step: int) -> None:
        self.saver.wait()  # a disk slower than the cadence holds up the training rather than fill the memory
        self.saver.save(epoch, step, self.trainer.pieces())

    def _round(self, epoch: int, step: int) -> tuple[int, Outcome]:
        """Run steps up to the next that all agree on; the step after it, and what they agreed."""
        first, expected = step, 0
        while True:
            self.spent.begin()
            samples, batch = self.take(step, step + 1 if step + 1 < self.total_steps else None)
            self.spent.loaded()
            self.seed(step)
            outcome = self.trainer.step(step, batch, samples, self.orders.take_wishes())
            self.spent.end(self.trainer)
            step, expected = step + 1, expected + samples
            if outcome.agreed:
                break
            self.go_on(epoch)
        if outcome.samples != expected:
            steps = f"step {first}" if step == first + 1 else f"steps {first} to {step - 1}"
            raise ClusterError(f"{steps} trained on {outcome.samples} samples instead of {expected}")
        return step, outcome
