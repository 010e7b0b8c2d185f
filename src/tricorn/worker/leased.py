"""The loop of an asynchronous run: each worker turns the steps it is lent into updates, at its own pace."""

from __future__ import annotations

import time
from collections import deque
from typing import cast

from tricorn.control import messages as m
from tricorn.strategy import LeasedTrainer, Wishes
from tricorn.worker.loop import Loop, Regrouping

AHEAD = 4  # steps a worker holds: the next one is there when one is done, and is known before
TELL_SECONDS = 1.0  # from one word of what steps were spent on to the next
# How long steps go unreported. For a message three processes take a core from those that compute: with one in 20 ms the
# coordinator took 0.16 ms of a core for each step of benchmarks/ps_ctr.py, with one in 100 ms 0.05.
REPORT_SECONDS = 0.1
MAX_UNREPORTED = 64


class LeasedLoop(Loop):
    """Steps arrive ahead of need; which they are, the coordinator decides."""

    def members_run(self, begin: m.Begin) -> None:
        trainer = cast(LeasedTrainer, self.trainer)
        epoch = begin.epoch
        lent: deque[int] = deque()
        credit = Credit(self.steps_per_epoch, len(begin.workers))
        self.link.send(m.Want(epoch=epoch, steps=credit.ask(0)))
        losses: dict[int, float] = {}
        reported = told = time.monotonic()
        while True:
            if lent and not self.orders.waiting():
                step = lent.popleft()
                losses[step] = self._step(step, lent[0] if lent else None)
                now = time.monotonic()
                if now - reported > REPORT_SECONDS or len(lent) < 2 or len(losses) >= MAX_UNREPORTED:
                    reported = now
                    self._report(epoch, losses, credit)
                    if now - told > TELL_SECONDS or not lent:
                        told = now
                        self.tell_spent(epoch, step)
                continue
            if not self.orders.waiting():
                trainer.idle()
            match order := self.orders.next():
                case m.Lease():
                    lent.extend(order.steps)
                    credit.lent(order.steps)
                case m.Evaluate():
                    trainer.refresh()
                    self.evaluate(epoch, order.step, order.start, order.stop)
                case _:
                    self.orders.put_back(order)
                    raise Regrouping

    def _step(self, step: int, following: int | None) -> float:
        """Train on a step; returns its mean loss."""
        self.spent.begin()
        samples, batch = self.take(step, following)
        self.spent.loaded()
        self.seed(step)
        outcome = self.trainer.step(step, batch, samples, Wishes())
        self.spent.end(self.trainer)
        return outcome.loss_sum / outcome.count if outcome.count else 0.0

    def _report(self, epoch: int, losses: dict[int, float], credit: Credit) -> None:
        self.link.send(
            m.Trained(epoch=epoch, steps=[*losses], losses=[*losses.values()]),
            m.Want(epoch=epoch, steps=credit.ask(len(losses))),
        )
        losses.clear()


class Credit:
    """How many steps a worker asks for: those it holds should last until it reports again, and ``AHEAD`` longer.

    Near the end of an epoch it holds no more than half of its share of what is left, so that all workers come there
    together (guided self-scheduling, Polychronopoulos and Kuck 1987).
    """

    def __init__(self, steps_per_epoch: int, workers: int) -> None:
        self._steps_per_epoch = steps_per_epoch
        self._workers = workers
        self._held = 0  # asked for, and not trained
        self._left = 0  # of the epoch, after the newest step that was lent

    def lent(self, steps: list[int]) -> None:
        self._left = self._steps_per_epoch - 1 - steps[-1] % self._steps_per_epoch

    def ask(self, trained: int) -> int:
        """How many more, having trained so many since the last time."""
        self._held -= trained
        most = max(AHEAD, self._left // (2 * self._workers))
        more = max(0, min(AHEAD + trained, most) - self._held)
        self._held += more
        return more
