"""The loop of an asynchronous run: each worker turns the steps it is lent into updates, at its own pace."""

from __future__ import annotations

from collections import deque
from typing import cast

from tricorn.control import messages as m
from tricorn.strategy import LeasedTrainer, Wishes
from tricorn.worker.loop import Loop, Regrouping

AHEAD = 2  # steps a worker holds, so that the next one is there when one is done


class LeasedLoop(Loop):
    """Steps arrive ahead of need; which they are, the coordinator decides."""

    def members_run(self, begin: m.Begin) -> None:
        trainer = cast(LeasedTrainer, self.trainer)
        epoch = begin.epoch
        lent: deque[int] = deque()
        self.link.send(m.Want(epoch=epoch, steps=AHEAD))
        while True:
            if lent and not self.orders.waiting():
                self._step(epoch, lent.popleft())
                continue
            if not self.orders.waiting():
                trainer.idle()
            match order := self.orders.next():
                case m.Lease():
                    lent.extend(order.steps)
                case m.Evaluate():
                    trainer.refresh()
                    self.evaluate(epoch, order.step, order.start, order.stop)
                case _:
                    self.orders.put_back(order)
                    raise Regrouping

    def _step(self, epoch: int, step: int) -> None:
        samples = self.batches.samples(step)
        batch = self.batches.training(step, *self.trainer.share(samples))
        self.seed(step)
        outcome = self.trainer.step(step, batch, samples, Wishes())
        self.link.send(
            m.Trained(epoch=epoch, step=step, loss=outcome.loss_sum / outcome.count if outcome.count else 0.0)
        )
        self.link.send(m.Want(epoch=epoch, steps=1))
