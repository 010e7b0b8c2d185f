"""A worker's loop: join a membership epoch, run steps until it is over, report what it holds, join the next."""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tricorn.control import messages as m
from tricorn.errors import AuthenticationError, PeerLost
from tricorn.state.gradient import seed_dropout
from tricorn.strategy import Batch, Foreseeing, Seat, Wishes
from tricorn.worker.evaluation import evaluate
from tricorn.worker.spent import Spent

if TYPE_CHECKING:
    from tricorn.job import Job
    from tricorn.strategy import Trainer
    from tricorn.worker.batches import Batches
    from tricorn.worker.link import Link
    from tricorn.worker.saver import Saver


KEPT_EVALUATIONS = 100  # how many are told again after a broken line


class Regrouping(Exception):
    """A newer membership epoch is forming: leave this one."""


class Orders:
    """What the coordinator ordered, handed from the link's thread to the worker's."""

    def __init__(self, announce: Callable[[int], None]) -> None:
        """``announce`` is told each new membership epoch: connections of older ones are worthless."""
        self.trainer: Trainer | None = None  # until the model is built
        self._announce = announce
        self._queue: queue.SimpleQueue[m.Order] = queue.SimpleQueue()
        self._returned: m.Order | None = None
        self.epoch = 0  # the newest membership epoch heard of
        self._wishes = Wishes()
        self._wishing = threading.Lock()

    def handle(self, order: m.Order) -> None:
        """Called on the link's thread."""
        if isinstance(order, m.Wish):
            with self._wishing:
                self._wishes = Wishes(self._wishes.checkpoint | order.checkpoint, self._wishes.stop | order.stop)
            return
        if isinstance(order, m.Regroup):
            self.epoch = order.epoch
            self.take_wishes()  # the coordinator will say them again
        if isinstance(order, m.Regroup | m.Shutdown) and self.trainer is not None:
            self.trainer.interrupt()
        if isinstance(order, m.Regroup):
            self._announce(order.epoch)  # after the interrupt, which ends the epoch announced before
        self._queue.put(order)

    def bytes_sent(self) -> int:
        return self.trainer.bytes_sent if self.trainer is not None else 0

    def next(self) -> m.Order:
        """The next order, waited for if need be."""
        if self._returned is not None:
            order, self._returned = self._returned, None
            return order
        return self._queue.get()

    def put_back(self, order: m.Order) -> None:
        """Have ``next`` return this order again."""
        self._returned = order

    def waiting(self) -> bool:
        return not self._queue.empty()

    def take_wishes(self) -> Wishes:
        with self._wishing:
            wishes, self._wishes = self._wishes, Wishes()
        return wishes


class Loop(ABC):
    """What both kinds of run share: membership, evaluation, and the order of seeds."""

    def __init__(
        self, *, job: Job, rank: int, trainer: Trainer, batches: Batches, link: Link, orders: Orders,
        saver: Saver, total_steps: int, steps_per_epoch: int, checkpoint_steps: int, address: m.Address,
    ) -> None:  # fmt: skip
        self.job = job
        self.rank = rank
        self.trainer = trainer
        self._foreseeing = trainer if isinstance(trainer, Foreseeing) else None  # asked once: it takes 8 us
        self.batches = batches
        self.link = link
        self.orders = orders
        self.saver = saver
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        self.checkpoint_steps = checkpoint_steps
        self.address = address
        self.spent = Spent()
        self._held: tuple[int, Batch] | None = None  # of the step that comes next
        self._evaluated: deque[m.Evaluated] = deque(maxlen=KEPT_EVALUATIONS)

    def run(self) -> None:
        """Until the coordinator says that it is over. Raises what the user's code raises."""
        while True:
            order = self.orders.next()
            if isinstance(order, m.Shutdown):
                return
            if isinstance(order, m.Regroup) and order.epoch == self.orders.epoch:
                self._ready(order.epoch)
            elif isinstance(order, m.Begin) and order.epoch == self.orders.epoch:
                self._held = None  # its share may be another one now
                try:
                    self.trainer.join(seat_of(order, self.trainer.part))
                    self.spent.begin_epoch()
                    self.members_run(order)
                except Regrouping:
                    pass  # the order to regroup is in the queue
                except (PeerLost, AuthenticationError) as lost:  # a stranger may have taken a dead peer's port
                    self.link.send(m.Broken(epoch=order.epoch, reason=str(lost)))

    @abstractmethod
    def members_run(self, begin: m.Begin) -> None:
        """One membership epoch."""

    def _ready(self, epoch: int) -> None:
        held = self.trainer.held()
        ready = m.Ready(
            epoch=epoch, part=self.trainer.part, held=[] if held is None else [held], address=self.address,
            evaluated=list(self._evaluated),
        )  # fmt: skip
        self.link.send(ready)

    def go_on(self, epoch: int) -> None:
        """Raises Regrouping if this membership epoch is over."""
        if self.orders.epoch != epoch:
            raise Regrouping

    def take(self, step: int, following: int | None) -> tuple[int, Batch]:
        """The samples of a step's global batch and this worker's share of it.

        A trainer that foresees is told of the ``following`` step, if any, whose batch is then kept for it.
        """
        held, self._held = self._held, None
        batch = held[1] if held and held[0] == step else self._share(step)
        if following is not None and self._foreseeing and self._foreseeing.foresees:
            self._held = following, self._share(following)
            self._foreseeing.foresee(*self._held)
        return self.batches.samples(step), batch

    def _share(self, step: int) -> Batch:
        return self.batches.training(step, *self.trainer.share(self.batches.samples(step)))

    def seed(self, step: int) -> None:
        """Dropout and its like: the same whenever this rank runs this step."""
        seed_dropout(self.job, step, self.rank)

    def tell_spent(self, epoch: int, step: int) -> None:
        """Let the run know what the steps so far were spent on."""
        self.link.send(m.Measured(epoch=epoch, step=step, what="seconds", values=self.spent.values()))

    def evaluate(self, epoch: int, step: int, start: int, stop: int) -> None:
        judge = evaluate(self.job, self.trainer, self.batches, start, stop, lambda: self.go_on(epoch))
        share = m.Evaluated(epoch=epoch, step=step, samples=judge.samples, sums=judge.sums)
        self._evaluated.append(share)
        self.link.send(share)


def seat_of(begin: m.Begin, part: str | None) -> Seat:
    """The seat of a worker that holds this part of the state."""
    source, peer = begin.source, 0
    if source == "peer":
        source, peer = ("peer", begin.peers[part]) if part in begin.peers else ("keep", 0)
    return Seat(
        epoch=begin.epoch, workers=tuple(begin.workers), servers=tuple(begin.servers), step=begin.step,
        source=source, peer=peer, checkpoint=Path(begin.checkpoint) if begin.checkpoint else None,
    )  # fmt: skip
