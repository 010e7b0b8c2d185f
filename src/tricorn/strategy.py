"""What ``ps``, ``dp`` and ``mp`` each fulfil: why a job cannot run, and a worker's half of the training.

A worker's loop (worker/) knows only ``Trainer``; the coordinator (control/) knows only steps and parts. All
that is particular to a strategy stands in its own folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from pathlib import Path

    from tricorn.comm.listener import PeerListener
    from tricorn.job import Job
    from tricorn.plan import Plan
    from tricorn.state.shards import Piece

Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Batch:
    """A slice of one global batch. ``samples`` may be 0: an empty slice is legal and still takes part."""

    inputs: Any  # tensor, tuple or dict of tensors; None when samples is 0
    target: Any
    samples: int
    count: int  # what the loss is a mean over: samples, or what job.count says


class Wishes(NamedTuple):
    """What one worker would like all to do after this step; agreed by summing, so that all do it at once."""

    checkpoint: int = 0
    stop: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What all workers agree a step was: sums over the global batch.

    Workers that make several steps before they meet agree on the last only: its sums are over all steps since the
    one agreed before. Steps in between say ``agreed=False`` and speak of this worker alone.
    """

    loss_sum: float  # loss times count, summed over the batch
    count: int
    samples: int
    wishes: Wishes
    agreed: bool = True

    @classmethod
    def of(cls, status: Sequence[float]) -> Outcome:
        """From the summed ``[loss_sum, count, samples, *wishes]`` in which workers tell their part."""
        loss_sum, count, samples, *wishes = status
        return cls(loss_sum, int(count), int(samples), Wishes(*map(int, wishes)))


@dataclass(frozen=True)
class Seat:
    """A worker's place in one membership epoch."""

    epoch: int  # membership epoch
    workers: tuple[Address, ...]  # by rank: where each worker listens for its peers
    servers: tuple[Address, ...]  # by index: where each parameter server listens
    step: int  # the step to go on from: this many updates are in the weights
    source: str  # "initial" | "keep" | "peer" | "checkpoint": where this worker's part comes from
    peer: int  # with "peer": the rank that has the state
    checkpoint: Path | None  # with "checkpoint": its folder


def even_share(samples: int, rank: int, workers: int) -> tuple[int, int]:
    """The samples [start, stop) of a global batch that fall to a rank when all get as many, to within one."""
    return samples * rank // workers, samples * (rank + 1) // workers


def _unheard(step: int, what: str, values: dict[str, float]) -> None:
    """Nobody wants to know."""


class Context(NamedTuple):
    """What every trainer is built from."""

    job: Job
    plan: Plan
    rank: int  # among the workers; plan.workers is how many there are
    incarnation: int
    secret: bytes
    listener: PeerListener  # where peers connect; its address is what Seat.workers tells the others
    measured: Callable[[int, str, dict[str, float]], None] = _unheard  # (step, what, values) for the run's metrics


class Trainer(Protocol):
    """A worker's half of a strategy: it turns its share of each global batch into the agreed update.

    Methods are called by one thread, ``interrupt`` by any. A peer's death makes them raise ``PeerLost``; a
    mistake of the user's code comes out as it was raised.
    """

    part: str | None  # the name of the part of the state that this rank holds, None if it holds none

    @property
    def bytes_sent(self) -> int:
        """Payload sent to other roles since the start."""

    def held(self) -> int | None:
        """The step whose state this worker holds whole, None if none."""

    def join(self, seat: Seat) -> None:
        """Take the seat: connect to the peers, and bring the state to ``seat.step``."""

    def share(self, samples: int) -> tuple[int, int]:
        """Which samples of a global batch of that many this worker has to load, as [start, stop)."""

    def step(self, step: int, batch: Batch, samples: int, wishes: Wishes) -> Outcome:
        """Run one global batch of ``samples`` samples, of which ``batch`` is this worker's share."""

    def evaluate(self, batch: Batch, samples: int, judge: Callable[[Any, Batch], None]) -> None:
        """Run the model forward on this worker's share of ``samples``; ``judge(output, batch)`` where output arises.

        With an empty share nothing is judged. A pipeline judges on its last stage only.
        """

    def pieces(self) -> Sequence[Piece]:
        """What this worker adds to a checkpoint, copied, so that training can go on while it is written."""

    def interrupt(self) -> None:
        """Make a call that is blocked on a peer raise ``PeerLost`` soon. Safe from any thread."""

    def close(self) -> None:
        """Release sockets and threads."""


class LeasedTrainer(Trainer, Protocol):
    """A trainer whose steps are not agreed: each worker turns whole global batches into updates by itself.

    Its ``share`` is everything and its ``Outcome`` speaks of its own batch.
    """

    def refresh(self) -> None:
        """Take the newest weights, as before an evaluation."""

    def idle(self) -> None:
        """Say that this worker waits for work, so that no bound on staleness waits for it."""


@runtime_checkable
class Foreseeing(Protocol):
    """A trainer that gains by knowing the next batch before it runs this one."""

    foresees: bool  # whether it does in this plan

    def foresee(self, step: int, batch: Batch) -> None:
        """That step comes after the next call of ``step``, unless a new membership epoch comes between."""


class Strategy(Protocol):
    """One of the three families. ``strategies`` lists them all."""

    def why_not(self, job: Job, plan: Plan) -> str | None:
        """One sentence that names what would have to change, None if the job can run. Builds the model."""

    def trainer(self, context: Context) -> Trainer:
        """A worker's half, with the model built from the job's seed: identical in every worker."""


def find(name: str) -> Strategy:
    """The strategy of that name, imported only now: each brings what only it needs."""
    import importlib

    folder = "hybrid" if "+" in name else name
    strategy: Strategy = importlib.import_module(f"tricorn.{folder}").strategy
    return strategy
