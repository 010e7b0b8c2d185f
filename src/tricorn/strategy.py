"""What ``ps``, ``dp`` and ``mp`` each fulfil: why a job cannot run, and a worker's half of the training.

A worker's loop (worker/) knows only ``Trainer``; the coordinator (control/) knows only steps and parts. All
that is particular to a strategy stands in its own folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from torch import Tensor, nn

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


class Beside(Protocol):
    """Tables that are trained beside what a trainer holds: on parameter servers, or spread over the workers.

    The trainer that is given one calls it by the thread that trains (``interrupt`` by any): ``attach`` for each model
    it builds, ``join`` for each membership epoch, and for each step ``fetch``, forward and backward, ``hand_over``,
    and ``commit`` once all workers agree. Every worker calls all of them, with no ``parts`` where it has no samples.
    """

    alone: bool  # whether no other worker holds what is held here: then the trainer's part is this rank's own
    foresees: bool  # whether it gains by knowing the next batch
    reads: bool  # once joined: whether this worker looks rows up, and so wants the inputs of its batches

    @property
    def bytes_sent(self) -> int:
        """Payload sent to other roles since the start."""

    def attach(self, model: nn.Module) -> None:
        """Replace the tables of a whole model, as the job builds it, in place: from now on they have no weights."""

    def join(self, seat: Seat, ranks: Sequence[int], module: nn.Module) -> None:
        """Take the seat, and bring the tables to ``seat.step``. Raises PeerLost.

        ``module`` is this worker's part of the attached model, and ``ranks`` are the workers that have the same part,
        in ascending order. Where the seat's source is a peer, ``carried`` is copied from it afterwards.
        """

    def carried(self) -> Tensor:
        """A small float64 tensor that who copies this worker's state copies too, in place."""

    def foresee(self, step: int, parts: Sequence[Any]) -> None:
        """The ``parts`` of the step that comes after the next ``fetch``; optional, and only if it ``foresees``."""

    def fetch(self, step: int, parts: Sequence[Any]) -> None:
        """Have the rows of a step here. ``parts``: the model's inputs for each forward (microbatch), in order."""

    def hand_over(self, count: int) -> float:
        """After backward and before the workers agree: the row gradients go to where they will be applied.

        They are sums over ``count`` of this worker's share; the counts of all workers add up to the global batch's.
        Returns an addend to the squared L2 norm of the summed gradient: all workers' addends make that of all tables.
        It is 0.0 unless the job clips. Raises Diverged, on every worker, PeerLost.
        """

    def commit(self, count: int, scale: float, factor: float) -> None:
        """All agree: the step takes effect with the mean over the global ``count``, times ``scale`` (of clipping).

        ``factor`` multiplies every rate (the job's schedule). Talks to nobody and cannot fail.
        """

    def abandon(self) -> None:
        """The step has failed: forget its gradients, here, and let the others fail too."""

    def judging(self, parts: Sequence[Any]) -> AbstractContextManager[None]:
        """A context in which forwards of these inputs find their rows, and nothing is learned."""

    def pieces(self) -> Sequence[Piece]:
        """What this worker adds to a checkpoint, copied; where servers hold the tables, they are told to save."""

    def interrupt(self) -> None:
        """Make a call that is blocked raise ``PeerLost`` soon. Safe from any thread."""

    def close(self) -> None:
        """Release sockets and threads."""


@runtime_checkable
class Timed(Protocol):
    """A trainer that says how much of its steps was computing."""

    computed: float  # seconds of forward and backward so far, without waiting for others


class Strategy(Protocol):
    """One of the three families. ``strategies`` lists them all."""

    def why_not(self, job: Job, plan: Plan) -> str | None:
        """One sentence that names what would have to change, None if the job can run. Builds the model."""

    def trainer(self, context: Context) -> Trainer:
        """A worker's half, with the model built from the job's seed: identical in every worker."""


class Family(Strategy, Protocol):
    """What trains the dense part of a model, alone or with tables beside it."""

    def trainer(self, context: Context, beside: Beside | None = None) -> Trainer:
        """As of any strategy; it trains all but what is ``beside``."""


def family(plan: Plan) -> Family:
    """Of the dense part of a plan, ``dp`` or ``mp``, imported only now."""
    import importlib

    found: Family = importlib.import_module(f"tricorn.{plan.dense}").strategy
    return found


def find(plan: Plan) -> Strategy:
    """The strategy of a plan, imported only now: each brings what only it needs."""
    import importlib

    folder = "hybrid" if plan.strategy != plan.dense or plan.embeddings != "whole" else plan.strategy
    strategy: Strategy = importlib.import_module(f"tricorn.{folder}").strategy
    return strategy
