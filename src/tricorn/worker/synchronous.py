"""The loop of a synchronous run: every worker runs every step, and all agree on each."""

from __future__ import annotations

import time

from tricorn.control import messages as m
from tricorn.errors import ClusterError
from tricorn.strategy import Outcome
from tricorn.worker.loop import Loop

REPORT_SECONDS = 0.05


class SynchronousLoop(Loop):
    """Steps follow one another without a word from the coordinator; the lead (rank 0) reports them in bundles."""

    def members_run(self, begin: m.Begin) -> None:
        epoch = begin.epoch
        if begin.evaluate:
            self.evaluate(epoch, begin.step, 0, self.batches.evaluation_samples)
        step, saved, stopped = begin.step, begin.saved, False
        losses: list[float] = []
        reported = 0.0  # the first step is told at once
        while step < self.total_steps and not stopped:
            self.go_on(epoch)
            outcome = self._step(step)
            step += 1
            losses.append(outcome.loss_sum / outcome.count if outcome.count else 0.0)
            last = step == self.total_steps
            boundary = step % self.steps_per_epoch == 0
            stopped = outcome.wishes.stop > 0
            if self.rank == 0 and (boundary or stopped or last or time.monotonic() - reported > REPORT_SECONDS):
                self.link.send(m.Committed(epoch=epoch, upto=step, losses=losses))
                losses, reported = [], time.monotonic()
            cadence = self.checkpoint_steps and step % self.checkpoint_steps == 0
            if outcome.wishes.checkpoint or cadence or ((stopped or last) and saved != step):
                self._save(epoch, step)
                saved = step
            if boundary and self.batches.evaluation_samples:
                self.evaluate(epoch, step, 0, self.batches.evaluation_samples)
        if saved != step:
            self._save(epoch, step)
        self.saver.wait()
        self.link.send(m.Finished(epoch=epoch, stopped=stopped, bytes_sent=self.trainer.bytes_sent))

    def _save(self, epoch: int, step: int) -> None:
        self.saver.wait()  # a disk slower than the cadence holds up the training rather than fill the memory
        self.saver.save(epoch, step, self.trainer.pieces())

    def _step(self, step: int) -> Outcome:
        samples = self.batches.samples(step)
        batch = self.batches.training(step, *self.trainer.share(samples))
        self.seed(step)
        outcome = self.trainer.step(step, batch, samples, self.orders.take_wishes())
        if outcome.samples != samples:
            raise ClusterError(f"step {step} trained on {outcome.samples} samples instead of {samples}")
        return outcome
